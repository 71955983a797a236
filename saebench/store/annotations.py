"""Annotations of features by users: labels, bookmarks, comments, lists and saved views, in ``user.sqlite``.

The file is beside the store's manifest, and only this module writes it. Entries are keyed by the hash of the
SAE's weights, so they survive indexing and belong to the same SAE wherever it is indexed again. Each call is
one transaction: several processes may write at the same time, and each reads what the others wrote. Reading
does not create the file. A damaged file is never changed or removed.
"""

from __future__ import annotations

import numbers
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saebench.core.errors import UserError
from saebench.core.files import remove_dead, write_json_atomic
from saebench.core.reading import read_json
from saebench.store.annotation_file import (
    FILE,
    FORMAT,
    FORMAT_VERSION,
    TABLES,
    AnnotationFile,
    checked,
    checked_row,
    insert,
    newer,
    now,
    replacing,
    select,
    where,
)

if TYPE_CHECKING:
    import pandas as pd


class Annotations:
    """The annotations of one SAE of a store.

    >>> notes = store.annotations
    >>> notes.set_label(3, "numbers of years")
    >>> notes.add_to_list("mine", [3, 1])
    >>> notes.label(3), notes.list_features("mine")
    ('numbers of years', [3, 1])

    Attributes:
        path: the file, which may not exist yet.
        sae_hash: hash of the weights whose annotations these are.
        author: the author of calls that do not name one; may be empty.

    With ``read_only``, methods that would change the file raise UserError.
    """

    def __init__(
        self,
        store: str | Path,
        sae_hash: str,
        *,
        d_sae: int | None = None,
        author: str = "",
        read_only: bool = False,
    ) -> None:
        self.path = Path(store) / FILE
        self._file = AnnotationFile(self.path, read_only=read_only)
        self.sae_hash = sae_hash
        self.author = author
        self._d_sae = d_sae

    # Labels

    def set_label(self, feature: int, label: str, *, author: str | None = None) -> None:
        """Name a feature; an empty label removes the name.

        Raises:
            UserError: no such feature, more than 200 characters, or a damaged or read-only file.
        """
        if label == "":
            self._remove("labels", feature=self._known(feature))
        else:
            self._put("labels", feature=self._known(feature), label=label, author=author)

    def label(self, feature: int) -> str | None:
        found = self._rows("labels", ("label",), feature=self._known(feature))
        return found[0][0] if found else None

    def labels(self) -> pd.DataFrame:
        """feature, label, author, time (UTC, ISO 8601)."""
        return self._frame("labels")

    # Bookmarks

    def bookmark(self, feature: int, on: bool = True, *, author: str | None = None) -> None:
        """Add or remove the bookmark of a feature."""
        if on:
            self._put("bookmarks", feature=self._known(feature), author=author)
        else:
            self._remove("bookmarks", feature=self._known(feature))

    def bookmarks(self) -> pd.DataFrame:
        """feature, author, time."""
        return self._frame("bookmarks")

    # Comments

    def comment(self, feature: int, comment: str, *, author: str | None = None) -> str:
        """Add a comment of up to 10,000 characters; returns its id."""
        made = uuid.uuid4().hex
        self._put("comments", id=made, feature=self._known(feature), comment=comment, author=author)
        return made

    def comments(self, feature: int | None = None) -> pd.DataFrame:
        """id, feature, comment, author, time; oldest first."""
        chosen = {} if feature is None else {"feature": self._known(feature)}
        return self._frame("comments", **chosen)

    def remove_comment(self, comment_id: str) -> None:
        """Raises UserError when there is no such comment."""
        if not self._remove("comments", id=comment_id):
            raise UserError(f"there is no comment {comment_id!r}; see comments()")

    # Lists of features

    def add_to_list(self, name: str, features: int | Iterable[int], *, author: str | None = None) -> None:
        """Add features, such as a column of a table, to a list; those on it already are not changed."""
        wanted = list(features) if isinstance(features, Iterable) else [features]
        numbers = [self._known(feature) for feature in wanted]
        rows = [self._row("list_entries", name=name, feature=number, author=author) for number in numbers]
        if rows:
            with self._file.writing() as connection:
                for row in rows:
                    insert(connection, "list_entries", row, "DO NOTHING")

    def remove_from_list(self, name: str, feature: int) -> None:
        """Remove a feature from a list; a list that becomes empty is removed."""
        self._remove("list_entries", name=name, feature=self._known(feature))

    def rename_list(self, name: str, new: str) -> None:
        """Rename a list; if a list has the new name already, the two are merged.

        Raises:
            UserError: there is no such list, or the new name is empty or too long.
        """
        with self._file.writing() as connection:
            columns = TABLES["list_entries"]
            rows = select(connection, "list_entries", columns, {"sae": self.sae_hash, "name": name})
            if not rows:
                raise self._unknown_list(name)
            condition, values = where({"sae": self.sae_hash, "name": name})
            connection.execute(f"DELETE FROM list_entries WHERE {condition}", values)
            for row in rows:
                entry = checked_row("list_entries", dict(zip(columns, row, strict=True)) | {"name": new})
                insert(connection, "list_entries", entry, "DO NOTHING")

    def remove_list(self, name: str) -> None:
        """Raises UserError when there is no such list."""
        if not self._remove("list_entries", name=name):
            raise self._unknown_list(name)

    def lists(self) -> pd.DataFrame:
        """name, n_features, time (of the newest entry)."""
        import pandas as pd

        entries = self._frame("list_entries")
        grouped = entries.groupby("name", sort=True)
        columns = {"n_features": grouped["feature"].size(), "time": grouped["time"].max()}
        made: pd.DataFrame = pd.DataFrame(columns).reset_index()
        return made

    def list_features(self, name: str) -> list[int]:
        """The features of a list, in the order in which they were added.

        Raises:
            UserError: no such list.
        """
        found: list[int] = [feature for (feature,) in self._rows("list_entries", ("feature",), name=name)]
        if not found:
            raise self._unknown_list(name)
        return found

    def _unknown_list(self, name: str) -> UserError:
        names = self.lists()["name"].tolist()
        there_is = f"there is {', '.join(names)}" if names else "there is none; make one with add_to_list"
        return UserError(f"there is no list {name!r}; {there_is}")

    # Saved views

    def save_view(self, name: str, query: str, *, author: str | None = None) -> None:
        """Save the query string of a page under a name; it replaces an older one of that name."""
        self._put("views", name=name, query=query, author=author)

    def views(self) -> pd.DataFrame:
        """name, query, author, time."""
        return self._frame("views")

    def remove_view(self, name: str) -> None:
        """Raises UserError when there is no such view."""
        if not self._remove("views", name=name):
            raise UserError(f"there is no saved view {name!r}; see views()")

    # Export and import

    def export_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """All entries of the file, for all SAEs, as JSON values; also written to ``path`` if given."""
        with self._file.reading() as connection:
            tables = {
                table: [dict(zip(columns, row, strict=True)) for row in select(connection, table, columns)]
                if connection
                else []
                for table, columns in TABLES.items()
            }
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **tables}
        if path is not None:
            remove_dead(Path(path).parent, Path(path).name)
            write_json_atomic(Path(path), content)
        return content

    def import_json(self, source: str | Path | Mapping[str, Any]) -> int:
        """Add the entries that ``export_json`` wrote, for all SAEs; returns how many changed the file.

        Of two labels of a feature, or two views of a name, the newer one is kept. A second import changes
        nothing. If any entry is not valid, nothing is imported.

        Raises:
            UserError: it is not an export of annotations, or an entry exceeds a limit.
        """
        if isinstance(source, Mapping):
            content, what = source, "the annotations to import"
        else:
            content, what = read_json(Path(source), what="the annotations"), f"the file {source}"
        rows = checked(content, what)
        changed = 0
        with self._file.writing() as connection:
            for table, entries in rows.items():
                for row in entries:
                    changed += insert(connection, table, row, newer(table))
        return changed

    # Rows

    def _known(self, feature: int) -> int:
        number = isinstance(feature, numbers.Real) and not isinstance(feature, bool)
        highest = 2**32 if self._d_sae is None else self._d_sae
        if not (number and 0 <= feature < highest and int(feature) == feature):
            raise UserError(f"feature {feature!r} is not in the SAE; it has 0 to {highest - 1}")
        return int(feature)

    def _row(self, table: str, **values: Any) -> dict[str, Any]:
        author = values.pop("author", None)
        given = {"author": self.author if author is None else author, "time": now(), **values}
        return checked_row(table, {"sae": self.sae_hash, **given})

    def _put(self, table: str, **values: Any) -> None:
        row = self._row(table, **values)
        with self._file.writing() as connection:
            insert(connection, table, row, replacing(table))

    def _remove(self, table: str, **chosen: Any) -> int:
        if not self.path.exists():
            return 0
        condition, values = where({"sae": self.sae_hash, **chosen})
        with self._file.writing() as connection:
            return connection.execute(f"DELETE FROM {table} WHERE {condition}", values).rowcount

    def _rows(self, table: str, columns: Sequence[str], **chosen: Any) -> list[tuple[Any, ...]]:
        with self._file.reading() as connection:
            if connection is None:
                return []
            return select(connection, table, columns, {"sae": self.sae_hash, **chosen})

    def _frame(self, table: str, **chosen: Any) -> pd.DataFrame:
        import pandas as pd

        columns = TABLES[table][1:]
        frame = pd.DataFrame(self._rows(table, columns, **chosen), columns=list(columns))
        return frame.astype({"feature": "int64"}) if "feature" in columns else frame
