"""A document of headings, paragraphs, lists, tables and figures, and how it reads as HTML and as Markdown."""

import html
import re
from dataclasses import dataclass, field

_CSS = """
body{margin:0 auto;max-width:60rem;padding:0 1rem 3rem;background:#fff;color:#1a1a1a;
 font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.35rem;margin-top:2.5rem;border-top:1px solid #bbb;padding-top:1rem}
h3{font-size:1.1rem;margin-top:2rem}
.wide{overflow-x:auto;margin:.75rem 0 1.5rem}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;caption-side:top;padding:.25rem 0;color:#444;max-width:40rem}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}
thead th{border-bottom:2px solid #666}
th:first-child{text-align:left;position:sticky;left:0;background:#fff}
figure{margin:1rem 0 1.5rem}figcaption{color:#444;font-size:.875rem;max-width:40rem}
svg{display:block;width:100%;min-width:34rem;height:auto}
summary{cursor:pointer;padding:.25rem 0}pre{overflow-x:auto;background:#f4f4f4;padding:.75rem;font-size:.8rem}
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: list[str]


@dataclass(frozen=True)
class Table:
    """Rows begin with their name; `bold` holds (row, column) of the cells to set in bold."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    bold: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Figure:
    """An SVG element; left out of Markdown, which cannot hold it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Details:
    """What is shown on demand."""

    title: str
    blocks: list["Block"]


Block = Heading | Paragraph | Bullets | Table | Figure | Code | Details


def to_html(title: str, blocks: list[Block]) -> str:
    """One page that needs nothing else."""
    body = "\n".join(map(_html, blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def to_markdown(blocks: list[Block]) -> str:
    """GitHub's Markdown."""
    return "\n\n".join(text for text in map(_markdown, blocks) if text) + "\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{html.escape(item)}</li>" for item in items) + "\n</ul>"
        case Table():
            return _html_table(block)
        case Figure(svg, caption):
            return f'<figure><div class="wide">{svg}</div>\n<figcaption>{html.escape(caption)}</figcaption></figure>'
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Details(title, blocks):
            inner = "\n".join(map(_html, blocks))
            return f"<details><summary>{html.escape(title)}</summary>\n{inner}\n</details>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    lines = []
    for number, (name, *cells) in enumerate(table.rows):
        line = f'<th scope="row">{html.escape(name)}</th>'
        for column, cell in enumerate(cells, start=1):
            text = html.escape(cell)
            line += f"<td><b>{text}</b></td>" if (number, column) in table.bold else f"<td>{text}</td>"
        lines.append(f"<tr>{line}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table><caption>{html.escape(table.caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escaped(text)}"
        case Paragraph(text):
            return _escaped(text)
        case Bullets(items):
            return "\n".join(f"- {_escaped(item)}" for item in items)
        case Table():
            return _markdown_table(block)
        case Figure():
            return ""
        case Code(text):
            fence = max(["``", *re.findall("`+", text)], key=len) + "`"
            return f"{fence}\n{text}\n{fence}"
        case Details(title, blocks):
            # GitHub reads Markdown inside HTML after an empty line.
            return f"<details><summary>{html.escape(title)}</summary>\n\n{to_markdown(blocks)}\n</details>"


def _markdown_table(table: Table) -> str:
    lines = [table.columns, ["---"] + ["---:"] * (len(table.columns) - 1)]
    for number, row in enumerate(table.rows):
        cells = map(_escaped, row)
        lines.append([f"**{cell}**" if (number, at) in table.bold else cell for at, cell in enumerate(cells)])
    lines[0] = list(map(_escaped, table.columns))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_escaped(table.caption)}\n\n{text}"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", " ".join(text.split()))
