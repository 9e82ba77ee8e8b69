"""Manifests that several ranks check together."""

from pathlib import Path

import pytest

from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.manifest import check_share, manifest_of
from tests import checkpoints


def test_every_tensor_is_checked_by_one_rank(tmp_path: Path) -> None:
    directory = checkpoints.version_model(tmp_path, 5)
    checkpoint, digests = checkpoint_of(directory), manifest_of(directory)
    for name in digests:
        refused = []
        for rank in range(2):
            try:
                check_share(digests | {name: "00"}, checkpoint, Parallel(rank, 2))
            except CheckpointError as error:
                refused.append(str(error))
        assert len(refused) == 1 and f"tensor {name} hashes to" in refused[0]


def test_the_largest_tensors_are_not_all_one_ranks(tmp_path: Path) -> None:
    directory = checkpoints.version_model(tmp_path, 5)
    checkpoint, digests = checkpoint_of(directory), manifest_of(directory)
    first, second = sorted(digests, key=lambda name: -checkpoint.tensors[name].nbytes)[:2]
    check_share(digests | {first: "00"}, checkpoint, Parallel(1, 2))
    with pytest.raises(CheckpointError):
        check_share(digests | {second: "00"}, checkpoint, Parallel(1, 2))
