"""A trainer's side of a weight update group: `python -m tests.trainer PORT WORLD_SIZE GROUP FILE [flat]`.

It joins as rank 0 in the way trainers do, then broadcasts every tensor of a safetensors file in the order of its names.
"""

import sys
from datetime import timedelta

import torch
from safetensors.torch import load_file
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(seconds=60)


def main(port: str, world_size: str, name: str, file: str, *options: str) -> None:
    torch.set_num_threads(1)
    store, rank, size = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, int(world_size), timeout=TIMEOUT))
    store = c10d.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(
        size, rank, [], c10d.Backend("gloo"), store, group_name=c10d.GroupName(name), timeout=TIMEOUT
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    tensors = [tensor for _, tensor in sorted(load_file(file).items())]
    print("joined", flush=True)
    sys.stdin.readline()  # the server's call is in flight
    if "flat" in options:
        tensors = [torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])]
    for tensor in tensors:
        c10d.broadcast(tensor, src=0, group=group)
    print("sent", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
