"""Records: what a task left behind, as JSON beside its tar, under a name that says what it was made from."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import TypeVar

from pydantic import ValidationError

from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.storage import Conflict

R = TypeVar("R", bound="Record")


class Record(Config):
    """Base of records. One exists when its object does and its tar is as long as it says."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Object name of the record."""

    @property
    @abstractmethod
    def tar_size(self) -> tuple[str, int] | None:
        """Object name and size of its tar; None where it has none."""

    def record(self) -> str:
        """As stored, JSON."""
        return self.model_dump_json()

    def digest(self) -> str:
        """sha256 of what is stored, hex."""
        return hashlib.sha256(self.record().encode()).hexdigest()


def load_record(dataset: Dataset, kind: type[R], name: str) -> R | None:
    """The record of this name, or None where it is missing or its tar is missing or cut.

    Raises:
        UserError: the record is damaged.
    """
    try:
        record = kind.model_validate_json(dataset.store.read(name))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(
            f"{dataset.uri}/{name}: damaged ({error.error_count()} wrong entries); delete it and build again"
        ) from None
    if record.tar_size is None:
        return record
    tar, size = record.tar_size
    found = dataset.store.find(tar)
    return record if found and found.size == size else None


def publish_record(dataset: Dataset, record: R) -> R:
    """Write a record, unless another build did this task meanwhile: the first one to finish counts and is returned."""
    data = record.record().encode()
    try:
        dataset.store.swap(record.name, data, None)
    except Conflict:
        earlier = load_record(dataset, type(record), record.name)
        if earlier is not None:
            return earlier
        dataset.store.write(record.name, data)
    return record
