"""The simulated device behaves as CUDA does where our code could be wrong."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from quartet.kernels.ops import resolve


@triton.jit
def _add_one(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place, place < size) + 1, place < size)


@triton.jit
def _write_beyond(x_ptr, size):
    tl.store(x_ptr + size, 1.0)


def captured(work) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


# tensors


def test_a_tensor_of_the_device_says_so_and_its_views_share_its_memory():
    x = torch.zeros(2, 3, device="cuda")
    assert x.is_cuda and x.device == torch.device("cuda", 0)
    x[1].fill_(5.0)
    assert x.tolist() == [[0, 0, 0], [5, 5, 5]]
    assert x[1].data_ptr() == x.data_ptr() + 3 * 4


def test_a_tensor_of_the_host_and_one_of_the_device_do_not_mix():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="found at least two devices"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="found at least two devices"):
        x.index_copy_(0, torch.tensor([1]), x[:1])
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]


def test_numpy_does_not_see_a_tensor_of_the_device():
    with pytest.raises(TypeError, match="copy the tensor to host memory first"):
        torch.ones(3, device="cuda").numpy()


def test_memory_that_nobody_wrote_to_is_poisoned():
    assert torch.empty(3, device="cuda").isnan().all()
    x = torch.zeros(3, device="cuda")
    assert torch.empty_like(x).isnan().all() and x.new_empty(2).isnan().all()
    assert torch.empty(1, dtype=torch.int32, device="cuda").item() == 0x7F7F7F7F


def test_memory_that_was_given_back_cannot_be_read():
    x = torch.ones(4, device="cuda")
    free, _ = torch.cuda.mem_get_info()
    x.untyped_storage().resize_(0)
    assert torch.cuda.mem_get_info()[0] == free + 16
    with pytest.raises(RuntimeError, match="illegal memory access"):
        x + 1
    x.untyped_storage().resize_(16)
    assert x.isnan().all()


def test_a_device_has_no_more_memory_than_it_has():
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(torch.cuda.mem_get_info()[1] + 1, dtype=torch.uint8, device="cuda")


# copies


def test_a_copy_to_page_locked_memory_has_not_landed_before_it_is_waited_for():
    host = torch.empty(2, pin_memory=True)
    host.copy_(torch.tensor([1.0, 2.0]).cuda(), non_blocking=True)
    assert host.isnan().all()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert host.tolist() == [1.0, 2.0]


def test_an_event_from_before_a_copy_does_not_stand_for_it():
    event = torch.cuda.Event()
    event.record()
    host = torch.empty(1, pin_memory=True)
    host.copy_(torch.ones(1, device="cuda"), non_blocking=True)
    event.synchronize()
    assert host.isnan().all()
    torch.cuda.synchronize()
    assert host.item() == 1.0


def test_a_stream_that_waits_for_another_lands_with_it():
    side, host = torch.cuda.Stream(), torch.empty(1, pin_memory=True)
    x = torch.ones(1, device="cuda")
    with torch.cuda.stream(side):
        host.copy_(x, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    assert host.isnan().all()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.current_stream().synchronize()
    assert host.item() == 1.0


def test_page_locked_memory_that_is_rewritten_too_early_is_noticed():
    host = torch.zeros(2).pin_memory()
    x = host.to("cuda", non_blocking=True)
    host.fill_(1.0)
    with pytest.raises(RuntimeError, match="before the copy from it had been waited for"):
        torch.cuda.synchronize()
    assert x.tolist() == [0, 0]


def test_page_locked_memory_that_is_dropped_too_early_is_kept_for_the_copy():
    x = torch.zeros(2).pin_memory().to("cuda", non_blocking=True)
    torch.zeros(2).pin_memory().fill_(3.0)
    torch.cuda.synchronize()
    assert x.tolist() == [0, 0]


WAITING = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "truth": lambda x: bool(x[0]),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "pageable": lambda x: torch.ones(2).to("cuda", non_blocking=True),
    "blocking": lambda x: torch.ones(2).pin_memory().to("cuda"),
    "another dtype": lambda x: x.copy_(torch.ones(2, dtype=torch.float64).pin_memory(), non_blocking=True),
    "numbers": lambda x: torch.tensor([1], device="cuda"),
    "indices of the host": lambda x: x[torch.tensor([0])],
    "a list of indices": lambda x: x[[0, 1]],
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
}


@pytest.mark.parametrize("what", WAITING)
def test_whatever_makes_the_host_wait_is_an_error_where_that_is_forbidden(what, no_waiting):
    torch.cuda.set_sync_debug_mode("default")
    x = torch.ones(2).cuda()
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        WAITING[what](x)


@pytest.mark.parametrize("what", WAITING)
def test_whatever_makes_the_host_wait_is_an_error_during_a_capture(what):
    x = torch.ones(2).cuda()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(lambda: WAITING[what](x))
    assert not torch.cuda.is_current_stream_capturing()


def test_work_that_waits_for_nothing_is_allowed_where_waiting_is_forbidden(no_waiting):
    x = torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    x[torch.zeros(1, dtype=torch.int64, device="cuda")] += 1
    x[x > 5] = 0.0
    x.masked_fill_(x > 1, 9.0)


# graphs


def test_a_captured_operation_does_not_run_before_it_is_replayed():
    x = torch.ones(2, device="cuda")
    graph = captured(lambda: x.add_(1))
    assert x.tolist() == [1, 1]
    graph.replay()
    graph.replay()
    assert x.tolist() == [3, 3]


def test_a_replay_computes_on_the_addresses_of_the_capture():
    x, made = torch.ones(2, device="cuda"), []
    graph = captured(lambda: made.append((x * 2).sum()))
    assert made[0].isnan()
    x.fill_(4.0)
    graph.replay()
    assert made[0].item() == 16


def test_what_is_read_in_a_graph_before_it_is_written_is_poison():
    x, made = torch.ones(2, device="cuda"), []
    graph = captured(lambda: made.append(torch.empty(2, device="cuda")) or x.add_(made[0]))
    graph.replay()
    assert x.isnan().all()


def test_a_graph_that_shares_its_pool_overwrites_what_another_one_left():
    pool, x, made = torch.cuda.graph_pool_handle(), torch.ones(2, device="cuda"), []
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph, pool=pool):
            made.append(x + 1)
    graphs[0].replay()
    assert made[0].tolist() == [2, 2]
    graphs[1].replay()
    assert made[0].isnan().all()


def test_a_graph_does_not_keep_memory_that_it_only_names():
    held = [torch.ones(2, device="cuda")]
    graph = captured(lambda: held[0].add_(1))
    held[0].untyped_storage().resize_(0)
    held[0].untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="another address"):
        graph.replay()
    held.clear()
    with pytest.raises(RuntimeError, match="freed"):
        graph.replay()


# kernels


def test_a_kernel_runs_on_the_device_and_takes_no_pointers_of_the_host():
    x, out = torch.ones(5, device="cuda"), torch.empty(5, device="cuda")
    _add_one[(2,)](x, out, 5, 4)
    assert out.tolist() == [2] * 5
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        _add_one[(2,)](x.cpu(), out, 5, 4)


def test_a_kernel_is_recorded_once_it_has_been_loaded():
    x, out = torch.ones(3, device="cuda"), torch.empty(3, device="cuda")
    with pytest.raises(RuntimeError, match="launched for the first time during a capture"):
        captured(lambda: _add_one[(1,)](x, out, 3, 8))
    _add_one[(1,)](x, out, 3, 8)
    graph = captured(lambda: _add_one[(1,)](x, out, 3, 8))
    x.fill_(6.0)
    graph.replay()
    assert out.tolist() == [7, 7, 7]


def test_a_kernel_that_leaves_the_memory_of_its_arguments_is_noticed():
    with pytest.raises(Exception, match="illegal memory access"):
        _write_beyond[(1,)](torch.ones(3, device="cuda"), 3)


@pytest.mark.interpreted
def test_the_operations_of_the_device_are_those_of_triton():
    assert resolve("cuda").gemv.__module__ == "quartet.kernels.triton.gemv"
