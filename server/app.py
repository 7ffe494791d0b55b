"""Start the rounds when Flower starts the server."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.rounds import run_rounds
from shared.errors import FedAugError, InputError
from shared.files import write_json

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    run_dir = Path(str(context.run_config.get("run-dir", "")))
    if not (run_dir / "plan.json").is_file():
        raise InputError(f"run-dir={str(run_dir)!r} holds no plan.json. Start the run with `fedaug simulate`.")
    failure = run_dir / "failure.json"
    failure.unlink(missing_ok=True)
    try:
        run_rounds(grid, run_dir)
    except FedAugError as error:
        # Flower keeps only a string of what stopped a run; whoever started it needs the exit code too.
        write_json(failure, {"exit_code": error.exit_code, "text": str(error)})
        raise
