"""fastprompt info: what there is here."""

from .app import app


@app.command()
def info() -> None:
    """Print versions, devices, native libraries and backends."""
    from fastprompt.info import describe

    describe()
