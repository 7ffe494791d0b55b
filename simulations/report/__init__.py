"""One self-contained page that tells a manager what a run brought and what it cost."""

from simulations.report.page import render_report

__all__ = ["render_report"]
