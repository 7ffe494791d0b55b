"""Privacy arithmetic: releases, their price, the noise a price buys."""
