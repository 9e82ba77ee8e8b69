"""A manifest says what a checkpoint's tensors must hash to: tensor name → xxh3 (64 bits, 16 hex digits) of its bytes.

`python -m quartet.scheduler_service.weights.manifest DIRECTORY` prints the manifest of a directory as JSON,
ready to be sent as `manifest` of /update_weights_from_disk. A trainer can make it while it saves:
`{name: xxhash.xxh3_64_hexdigest(tensor.cpu().contiguous().view(torch.uint8).numpy()) for name, tensor in ...}`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import xxhash

from quartet.runtime.shorten import short
from quartet.scheduler_service.host.background import yield_point
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError, StoredTensor
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.load import tensor_list
from quartet.scheduler_service.weights.tensor_io import bytes_of, open_file, read_chunks

Manifest = Mapping[str, str]

CHUNK_BYTES = 1 << 20  # read between two yield points


def check_names(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless manifest and checkpoint name the same tensors."""
    if unlisted := sorted(checkpoint.tensors.keys() - manifest.keys()):
        raise CheckpointError(f"the manifest lacks {tensor_list(unlisted)}")
    if missing := sorted(manifest.keys() - checkpoint.tensors.keys()):
        raise CheckpointError(f"the checkpoint lacks {tensor_list(missing)} of the manifest")


def check_digest(manifest: Manifest, name: str, digest: str) -> None:
    """Raise CheckpointError where the manifest has another digest of a tensor; it need not list tied tensors."""
    if (expected := manifest.get(name, digest).lower()) != digest:
        raise CheckpointError(f"tensor {name} hashes to {digest}, the manifest says {short(expected)}")


def check_share(manifest: Manifest, checkpoint: Checkpoint, ranks: Parallel) -> None:
    """Check the digests of this rank's share of the tensors, whole ones; the other ranks check the rest.

    A rank loads parts of tensors. That the hashed bytes are the loaded ones follows from the identity of the files,
    which is the same before and after. Raises CheckpointError.
    """
    largest_first = sorted(checkpoint.tensors, key=lambda name: (-checkpoint.tensors[name].nbytes, name))
    for name in largest_first[ranks.rank :: ranks.size]:
        check_digest(manifest, name, digest_of(checkpoint.tensors[name]))


def manifest_of(directory: Path) -> dict[str, str]:
    """The manifest of all tensors in a directory. Raises CheckpointError."""
    checkpoint = checkpoint_of(directory)
    return {name: digest_of(tensor) for name, tensor in sorted(checkpoint.tensors.items())}


def digest_of(stored: StoredTensor) -> str:
    """The digest of a tensor's bytes in its file. Raises CheckpointError."""
    digest = xxhash.xxh3_64()
    with open_file(stored.file) as descriptor:
        for values, _ in read_chunks(stored, None, descriptor, CHUNK_BYTES):
            yield_point()
            digest.update(bytes_of(values))
    return digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the manifest of a checkpoint directory.")
    parser.add_argument("directory", type=Path)
    print(json.dumps(manifest_of(parser.parse_args().directory), indent=1))
