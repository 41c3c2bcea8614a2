"""Whether a checkpoint is still what was saved: the files by their checksums, with or without a manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from mindspeed_mm.checkpoint import manifest as manifests
from mindspeed_mm.checkpoint.coordination import condense, gather, group_position
from mindspeed_mm.checkpoint.manifest import Manifest
from mindspeed_mm.checkpoint.tensor_index import NAME as INDEX
from mindspeed_mm.checkpoint.tensor_index import read_index
from mindspeed_mm.checkpoint.tensors import listing
from mindspeed_mm.errors import UserError


@dataclass(frozen=True)
class Condition:
    """What is known of a checkpoint's state.

    Attributes:
        manifest: None if it has none, or a damaged one.
        problems: one line for each file that is damaged or missing.
        unlisted: files that the manifest does not know.
    """

    manifest: Manifest | None
    problems: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing speaks against loading it."""
        return not self.problems


def inspect(
    path: Path,
    group: dist.ProcessGroup | None = None,
    *,
    alone: bool = True,
    quick: bool = False,
    share: tuple[int, int] | None = None,
) -> Condition:
    """Check every file of a checkpoint.

    Without a manifest, files are only known to be there and long enough for the tensors that the index puts in them.

    Args:
        path: the checkpoint's folder.
        group: the ranks that share the work.
        alone: check on this rank only; otherwise a collective, whose result is the same on all ranks.
        quick: compare sizes instead of checksums.
        share: this rank's number among those that share a disk, and how many they are; by default all ranks do.
    """
    try:
        manifest = manifests.read(path)
    except UserError as error:
        found, manifest = [str(error)], None
    else:
        found = _unsealed(path) if manifest is None else []
    mine, ranks = (0, 1) if alone else share or group_position(group)
    if manifest is not None:
        # The largest first, dealt out in turn: shards are of about the same size.
        names = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
        for name in names[mine::ranks]:
            problem = manifests.what_changed(path / name, manifest.files[name], sizes_only=quick)
            found += [problem] if problem else []
    if not alone:
        of_ranks = gather((found, manifest is None), group)
        if len({without for _, without in of_ranks}) > 1:  # folders on the hosts' own disks, say
            found = [f"{manifests.NAME} is missing on some ranks"]
        found = sorted({problem for problems, _ in of_ranks for problem in [*problems, *found]})
    known = {manifests.NAME, *(manifest.files if manifest else ())}
    unlisted = sorted(p.name for p in path.iterdir() if p.name not in known) if manifest else []
    return Condition(manifest, found, unlisted)


def check_whole(path: Path) -> None:
    """Check every file of a checkpoint that is about to be converted, in one process.

    Raises:
        UserError: it is damaged; names the files.
    """
    if not (condition := inspect(path)).good:
        raise UserError(f"{path} is damaged and is not converted:\n{listing(condition.problems)}")


def _unsealed(path: Path) -> list[str]:
    needed: dict[str, int] = {}
    try:
        for place in (read_index(path).storage_data or {}).values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        sizes = {name: (path / name).stat().st_size if (path / name).is_file() else None for name in sorted(needed)}
    except UserError as error:
        return [str(error)]
    except (AttributeError, TypeError, ValueError) as error:  # a flipped bit can make an index of odd values
        return [f"{INDEX} is damaged: {condense(error)}"]
    return [
        f"{name} is missing" if size is None else f"{name} has {size} bytes, {needed[name]} were saved"
        for name, size in sizes.items()
        if size is None or size < needed[name]
    ]
