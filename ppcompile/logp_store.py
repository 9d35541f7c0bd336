"""Rows of log-probabilities by key in one SQLite file that belongs to one reference.

A killed process leaves whole transactions, and several processes may write at once. Rows are never changed: what is
there stays.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["LogpStore", "Row"]

Row = NDArray[np.float32]
"""What is kept of a sequence; its meaning is the caller's."""

FORMAT = "ppcompile log-probabilities, 1"
WAIT_SECONDS = 60.0  # for another process to finish its transaction
KEYS_PER_QUERY = 500


class LogpStore:
    """See the top of this file.

    Attributes:
        path: the file.
        owner: the name of the reference whose log-probabilities it holds.
    """

    def __init__(self, path: Path, owner: str) -> None:
        """Open the file, or begin it.

        Raises:
            ValueError: it belongs to another reference, or is none of ours.
        """
        self.path, self.owner = path, owner
        with self._transaction() as database:
            if not _tables(database):
                self._begin(database)
            self._check(database)

    def read(self, keys: Sequence[bytes]) -> dict[bytes, Row]:
        """The rows that are there, by key."""
        rows: dict[bytes, Row] = {}
        with self._transaction() as database:
            for start in range(0, len(keys), KEYS_PER_QUERY):
                some = keys[start : start + KEYS_PER_QUERY]
                marks = ",".join("?" * len(some))
                for key, row in database.execute(f"SELECT key, row FROM logps WHERE key IN ({marks})", some):
                    rows[key] = np.frombuffer(row, dtype="<f4")
        return rows

    def write(self, rows: Mapping[bytes, Row]) -> None:
        """Add rows, all or (if the process dies) none of them."""
        with self._transaction() as database:
            # Another process may have been faster; its row is as good.
            database.executemany(
                "INSERT OR IGNORE INTO logps VALUES (?, ?)",
                [(key, row.astype("<f4").tobytes()) for key, row in rows.items()],
            )

    def __len__(self) -> int:
        with self._transaction() as database:
            (count,) = database.execute("SELECT count(*) FROM logps").fetchone()
        return int(count)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own each time, as none survives a fork or may move to another thread."""
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS)) as database, database:
                yield database
        except sqlite3.OperationalError:
            raise  # a full disk, or a lock that stays: the file itself is well
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is no file of log-probabilities, or is damaged: {error}") from error

    def _begin(self, database: sqlite3.Connection) -> None:
        database.execute("BEGIN IMMEDIATE")
        if _tables(database):
            return  # another process was faster
        database.execute("CREATE TABLE about (format TEXT NOT NULL, owner TEXT NOT NULL)")
        database.execute("CREATE TABLE logps (key BLOB PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID")
        database.execute("INSERT INTO about VALUES (?, ?)", (FORMAT, self.owner))

    def _check(self, database: sqlite3.Connection) -> None:
        tables = _tables(database)
        if tables != {"about", "logps"}:
            raise ValueError(f"{self.path} is a database of something else (tables {', '.join(sorted(tables))})")
        ((written, owner),) = database.execute("SELECT format, owner FROM about").fetchall()
        if written != FORMAT:
            raise ValueError(f"{self.path} is written as {written!r}, and this version reads {FORMAT!r}")
        if owner != self.owner:
            raise ValueError(
                f"{self.path} holds the log-probabilities of {owner!r}, and this reference is {self.owner!r}. "
                "Nothing was read or written. Try: a file for each reference, or the one it was made with"
            )


def _tables(database: sqlite3.Connection) -> set[str]:
    return {table for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
