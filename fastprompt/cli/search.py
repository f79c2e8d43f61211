"""fastprompt embed and search: vectors of sentences, and the English ones that are nearest."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from .app import Adapter, Backbone, BatchSize, Device, Option, app, quiet
from .progress import counting

_CHUNK = 4096  # texts among which batches of like length are made
Column = Annotated[str, Option(help="Where the texts are, in a file with columns.")]


@app.command()
def embed(
    adapter: Adapter,
    input: Annotated[str, Option(help="Texts, one a line; or CSV, TSV, JSON lines, Parquet; - for stdin.")],
    output: Annotated[Path, Option(help=".npy: the vectors; .parquet: text and vector.")],
    source: Annotated[
        bool, Option("--source", help="The texts are English: by the frozen model, as the others' goal was.")
    ] = False,
    column: Column = "text",
    batch_size: BatchSize = 32,
    backbone: Backbone = None,
    device: Device = None,
) -> None:
    """Write the vectors of sentences: those of translations lie near those of their English sentences (--source)."""
    from fastprompt._files import write_aside
    from fastprompt.inference import load

    if output.suffix not in (".npy", ".parquet"):
        raise ValueError(f"output must end in .npy or .parquet, got {str(output)!r}")
    quiet()
    found = list(texts(input, column))
    loaded = load(adapter, backbone=backbone, device=device)
    vectors = embedded(loaded, found, source, batch_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".npy":
        import numpy

        write_aside(output, lambda aside: numpy.save(aside, vectors))
    else:
        _write_parquet(output, found, vectors)
    typer.echo(f"{len(vectors)} vectors of {vectors.shape[1]} numbers are in {output}")


@app.command()
def search(
    adapter: Adapter,
    corpus: Annotated[str, Option(help="English texts, one a line or a table; or vectors of them that embed wrote.")],
    query: Annotated[
        list[str] | None, Option(help="What is looked for; may be given again. Without it: stdin, a query a line.")
    ] = None,
    top_k: Annotated[int, Option(min=1, help="Texts to show of each.")] = 5,
    column: Column = "text",
    batch_size: BatchSize = 32,
    backbone: Backbone = None,
    device: Device = None,
) -> None:
    """Find the English sentences nearest to one in the language that was trained.

    Prints query, rank, cosine, row of the corpus (from 1) and text, with tabs between.
    """
    from fastprompt.inference import Index, load

    quiet()
    path = Path(corpus)
    if path.suffix == ".npy":
        index = Index.load(path)
    elif path.suffix == ".parquet" and (held := _read_parquet(path)) is not None:
        index = Index(held[1], held[0])
    else:
        index = list(texts(corpus, column))
    loaded = load(adapter, backbone=backbone, device=device)
    if isinstance(index, list):
        index = Index(embedded(loaded, index, True, batch_size), index)
    lines = query or (line.rstrip("\r\n") for line in sys.stdin)
    for wanted in filter(str.strip, lines):  # one by one: an answer comes before the next question
        (hits,) = loaded.search([wanted], index, top_k)
        for rank, hit in enumerate(hits, 1):
            cells = [wanted, str(rank), f"{hit.score:.4f}", str(hit.index + 1), hit.text or ""]
            typer.echo("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in cells))


def texts(source: str, column: str) -> Iterator[str]:
    """The texts of a file, line by line, or of a table's column."""
    from fastprompt.data.table import iter_rows

    any_row = False
    for number, row in enumerate(iter_rows(source), 1):
        any_row = True
        if column not in row:
            raise ValueError(f"{source} must have a column {column!r}, only {', '.join(row)}: --column says which")
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(f"{source}, row {number}: {column} must be a text, got {row[column]!r}")
        yield row[column]
    if not any_row:
        raise ValueError(f"{source}: no rows in it, expected at least one")


def embedded(loaded, found: Iterable[str], source: bool, batch_size: int):
    """(N, D) float32 vectors; how far it is shows on a terminal."""
    import numpy

    parts, rest = [], iter(found)
    with counting("texts") as on_batch:
        while part := list(itertools.islice(rest, _CHUNK)):
            parts.append(loaded.encode(part, source=source, batch_size=batch_size))
            on_batch(len(part))
    return numpy.concatenate(parts)


def _write_parquet(path: Path, found: list[str], vectors) -> None:
    from fastprompt._extras import require
    from fastprompt._files import write_aside

    pyarrow, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
    flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
    table = pyarrow.table({"text": pyarrow.array(found), "vector": flat})
    write_aside(path, lambda aside: parquet.write_table(table, aside))


def _read_parquet(path: Path):
    """Texts and vectors, where embed wrote the file."""
    import numpy

    from fastprompt._extras import require

    pyarrow, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
    try:
        if not {"text", "vector"} <= set(parquet.read_schema(path).names):
            return None
        table = parquet.read_table(path, columns=["text", "vector"])
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    vectors = table["vector"].combine_chunks()
    return table["text"].to_pylist(), numpy.asarray(vectors.flatten()).reshape(len(vectors), -1)
