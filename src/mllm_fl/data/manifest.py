"""Who holds which training images, as a small file that drives the simulator and real devices alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mllm_fl.data.files import write_whole
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError

FORMAT = 1


def sha256_of(value: object) -> str:
    """SHA-256 of ``json.dumps(value)`` with Python's default separators, as hexadecimal text."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def fingerprint(train: ImageSet) -> str:
    """Identity of a training set as far as indices need it: class names and the label of every position.

    Pixels do not enter: lossy decoders differ between machines, and the labels already betray another order or version.
    """
    return sha256_of([list(train.class_names), train.labels.tolist()])


@dataclass(frozen=True)
class Manifest:
    """A partition with everything that made it; ``clients`` holds sorted indices into the training set.

    ``imbalance_factor`` is what was asked for, ``achieved_imbalance`` the ratio of the class counts that came out.
    ``subset_sha256`` is taken over the list, class by class, of the sorted training indices kept.
    """

    dataset: str
    fingerprint: str
    images: int
    class_names: tuple[str, ...]
    imbalance_factor: float
    achieved_imbalance: float
    partition: str
    alpha: float
    min_size: int
    seed: int
    class_counts: tuple[int, ...]
    subset_sha256: str
    clients: Sequence[tuple[int, ...]]

    @property
    def listed(self) -> Sequence[tuple[int, ...]]:
        """The clients that are described one by one: all, unless there are too many to list (:mod:`mllm_fl.data.virtual`)."""
        return self.clients

    @property
    def total(self) -> int:
        """Number of training images that some client holds."""
        return sum(map(len, self.clients))

    @property
    def client_sha256(self) -> tuple[str, ...]:
        """SHA-256 of ``json.dumps`` of each client's sorted indices."""
        return tuple(sha256_of(list(indices)) for indices in self.clients)

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole content: the identity that a run records."""
        return sha256_of(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        content = asdict(self)
        del content["clients"]
        clients = [
            {"size": len(indices), "sha256": digest, "indices": list(indices)}
            for indices, digest in zip(self.clients, self.client_sha256, strict=True)
        ]
        return {"format": FORMAT, "sha256": self.sha256, **content, "total": self.total, "clients": clients}


def save(manifest: Manifest, path: str | Path) -> None:
    """Write the manifest as JSON, one client a line; the file appears whole or not at all."""
    content = manifest.to_json()
    clients = content.pop("clients")
    if isinstance(clients, dict):  # a rule
        write_whole(Path(path), (json.dumps({**content, "clients": clients}, indent=1) + "\n").encode())
        return
    clients = ",\n".join("  " + json.dumps(client) for client in clients)
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_whole(Path(path), f'{{\n{head},\n "clients": [\n{clients}\n ]\n}}\n'.encode())


def load(path: str | Path) -> Manifest:
    """Read a manifest and verify its hashes; a file that was edited or cut short is refused."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})", "give the path of a saved manifest.json") from None
    except ValueError as error:
        raise UserError(
            path, f"is not a whole JSON file ({error})", "write it again from the same configuration"
        ) from None
    return parse(content, path)


def parse(content: Any, place: object) -> Manifest:
    """The manifest in an already decoded JSON object, verified; ``place`` is named in errors."""
    way_out = "write it again from the same configuration"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(place, f"is not a manifest of format {FORMAT}", way_out)
    try:
        values = {field.name: content[field.name] for field in fields(Manifest)}
        values["class_names"] = tuple(values["class_names"])
        values["class_counts"] = tuple(values["class_counts"])
        if isinstance(content["clients"], dict):
            from mllm_fl.data.virtual import parsed

            return _whole(parsed(values), content, place)
        values["clients"] = tuple(tuple(int(i) for i in client["indices"]) for client in content["clients"])
        digests = [client["sha256"] for client in content["clients"]]
        manifest = Manifest(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(place, f"lacks or garbles {error}", way_out) from None
    for k, (found, written) in enumerate(zip(manifest.client_sha256, digests, strict=True)):
        if found != written:
            raise UserError(place, f"the indices of client {k} do not match their sha256", way_out)
    return _whole(manifest, content, place)


def _whole(manifest: Manifest, content: dict[str, Any], place: object) -> Manifest:
    if manifest.sha256 != content.get("sha256"):
        problem = "its content does not match its sha256"
        raise UserError(place, problem, "write it again from the same configuration")
    return manifest


def verify(manifest: Manifest, train: ImageSet, place: object) -> None:
    """Refuse a manifest that was made for other training images, or whose indices are not a partition of its subset."""
    if manifest.fingerprint != fingerprint(train):
        raise UserError(
            place,
            f"was made for another {manifest.dataset} (images, order or class names differ: {manifest.images} there, {len(train)} here)",
            "point data.root at the data set it was made from, or build a new manifest",
        )
    flat = [i for indices in manifest.clients for i in indices]
    if len(set(flat)) != len(flat) or (flat and not 0 <= min(flat) <= max(flat) < len(train)):
        raise UserError(place, "gives an image to two clients, or an index that does not exist", "build a new manifest")
    if subset_sha256(by_class(flat, train)) != manifest.subset_sha256:
        raise UserError(place, "its clients do not hold the subset that subset_sha256 names", "build a new manifest")


def by_class(indices: Sequence[int], train: ImageSet) -> list[list[int]]:
    """The indices, one list per class."""
    out: list[list[int]] = [[] for _ in train.class_names]
    for i in indices:
        out[int(train.labels[i])].append(i)
    return out


def subset_sha256(kept: Sequence[Sequence[int]]) -> str:
    """SHA-256 of ``json.dumps`` of the list, class by class, of the sorted indices."""
    return sha256_of([sorted(indices) for indices in kept])
