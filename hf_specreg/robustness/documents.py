"""Versioned JSON documents: read, held to their schema, and written whole or not at all."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Format:
    """A kind of document.

    Args:
        name: as errors call one, "report".
        package: that holds the schema.
        schema: its file.
        versions: that are read, as numbers of the key "schema".
        largest: bytes of a file.
        error: what is raised of a document that is none; takes one sentence.
    """

    name: str
    package: str
    schema: str
    versions: tuple[int, ...]
    largest: int
    error: type[ValueError]

    def read(self, path: Path) -> dict[str, Any]:
        """Return what a file holds, which is not checked yet.

        Raises:
            ValueError: of the format, it cannot be read or holds no object.
        """
        try:
            if path.stat().st_size > self.largest:
                raise ValueError(f"it has more than {self.largest >> 20} MiB")
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.error(f"{path} cannot be read as a {self.name}: {error}") from error
        if not isinstance(content, dict):
            raise self.error(f"{path} is no {self.name}")
        return content

    def checked(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content as plain JSON, without a number that is NaN or infinite.

        Raises:
            ValueError: of the format, where it does not fit the schema or is of another version.
        """
        try:
            content = json.loads(json.dumps(content, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise self.error(f"the {self.name} is not valid JSON: {error}") from error
        found = content.get("schema")
        if found not in self.versions:
            raise self.error(
                f"this {self.name} has format {str(found)[:20]}, this version of hf_specreg reads "
                f"{' and '.join(map(str, self.versions))}"
            )
        try:
            first = islice(self._validator.iter_errors(content), 1)
            problem = jsonschema.exceptions.best_match(first)
        except RecursionError as error:
            raise self.error(f"the {self.name} is nested too deeply") from error
        if problem is not None:
            where = "/".join(map(str, problem.absolute_path)) or f"the {self.name}"
            raise self.error(f"{where}: {problem.message[:200]}")
        return content

    @cached_property
    def _validator(self) -> jsonschema.Draft202012Validator:
        schema = files(self.package).joinpath(self.schema).read_text("utf-8")
        return jsonschema.Draft202012Validator(json.loads(schema))


def to_json(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a document."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def to_parquet(table: pa.Table) -> bytes:
    """Return the bytes of a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files in this order, each whole; where one cannot be written, all stay as they were.

    Raises:
        OSError: the disk is full or read-only.
    """
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in contents}
    try:
        for path, content in contents.items():
            with partials[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, partial in partials.items():
            os.replace(partial, path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
