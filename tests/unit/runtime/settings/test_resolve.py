"""Every open question is answered once; contradictions are refused with their remedy."""

import json

import msgspec
import pytest

from quartet.runtime.config import ResolvedConfig, ServerConfig, Speculation
from quartet.runtime.errors import StartupError
from quartet.runtime.settings.machine import Machine, look_at_machine
from quartet.runtime.settings.resolve import resolve

CPU = Machine()
GPU = Machine(has_gpu=True, torch_has_cuda=True)


def test_a_machine_without_a_gpu_gets_the_answers_of_a_cpu():
    config = resolve(ServerConfig(), CPU).config
    assert (config.device, config.attention_backend, config.chunked_prefill_size) == ("cpu", "torch_native", 512)
    assert (config.page_size, config.max_running_requests, config.max_queued_requests) == (16, 256, 1024)


def test_a_machine_with_a_gpu_gets_the_answers_of_a_gpu():
    config = resolve(ServerConfig(), GPU).config
    assert (config.device, config.attention_backend, config.chunked_prefill_size) == ("cuda", "triton", 8192)


def test_a_gpu_without_a_torch_that_can_use_it_is_not_used():
    assert resolve(ServerConfig(), Machine(has_gpu=True)).config.device == "cpu"


@pytest.mark.parametrize("given", [{}, {"device": "cuda"}, {"device": "cuda", "attention_backend": "triton"}])
def test_a_gpu_without_triton_is_refused_with_what_to_install(given):
    machine = Machine(has_gpu=True, torch_has_cuda=True, has_triton=False)
    with pytest.raises(
        StartupError, match=r"pip install 'quartet-serve\[gpu\]', or use --attention-backend torch_native"
    ):
        resolve(ServerConfig(**given), machine)


@pytest.mark.parametrize("given", [{"device": "cpu"}, {"attention_backend": "torch_native"}])
def test_without_triton_all_else_is_served(given):
    resolve(ServerConfig(**given), Machine(has_gpu=True, torch_has_cuda=True, has_triton=False))


def test_what_was_given_is_kept():
    given = ServerConfig(page_size=1, max_running_requests=3, max_queued_requests=5, chunked_prefill_size=-1)
    resolved = resolve(given, GPU).config
    assert (resolved.page_size, resolved.max_running_requests, resolved.max_queued_requests) == (1, 3, 5)
    assert resolved.chunked_prefill_size == -1


@pytest.mark.parametrize(
    ("given", "window"), [({}, (2, 8)), ({"min": 12}, (12, 12)), ({"max": 1}, (1, 1)), ({"min": 3, "max": 5}, (3, 5))]
)
def test_speculation_has_sizes_where_it_is_on_and_its_window_takes_what_was_given(given, window):
    sizes = {f"speculative_ngram_{end}_match_window_size": size for end, size in given.items()}
    config = resolve(ServerConfig(speculative_algorithm="NGRAM", **sizes), CPU).config
    assert config.speculative_num_draft_tokens == 8
    assert (
        config.speculative_ngram_min_match_window_size,
        config.speculative_ngram_max_match_window_size,
    ) == window
    assert resolve(config, CPU).config == config
    assert resolve(ServerConfig(), CPU).config.speculative_num_draft_tokens is None


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("settings", [{}, {"speculative_algorithm": "NGRAM"}, {"enable_priority_scheduling": True}])
def test_a_resolved_configuration_reaches_a_service_with_the_types_it_reads(settings, machine):
    config = resolve(ServerConfig(**settings), machine).config
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=ResolvedConfig) == config


def test_a_service_refuses_a_configuration_that_was_not_resolved():
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(ServerConfig()), type=ResolvedConfig)


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({}, "max_graph_rows", 512),
        ({"cuda_graph_max_bs": 4}, "max_graph_rows", 4),
        ({"disable_cuda_graph": True}, "max_graph_rows", 0),
        ({}, "access_log_level", "info"),
        ({"log_level": "debug", "log_level_http": "error"}, "access_log_level", "error"),
        ({"req_waiting_timeout": 2.5}, "waiting_timeout_s", 2.5),
        ({"req_waiting_timeout": 0.0}, "waiting_timeout_s", None),
        ({}, "running_timeout_s", None),
        ({}, "preemption_threshold", None),
        ({"enable_priority_scheduling": True}, "preemption_threshold", 10),
        ({"schedule_policy": "priority", "disable_priority_preemption": True}, "preemption_threshold", None),
        ({}, "speculation", None),
        ({"speculative_algorithm": "NGRAM"}, "speculation", Speculation(8, 2, 8)),
        ({"random_seed": 7}, "dummy_seed", 7),
    ],
)
def test_what_several_flags_come_to_is_decided_once(settings, field, value):
    assert getattr(resolve(ServerConfig(**settings), GPU).config, field) == value


def test_resolving_twice_changes_nothing():
    once = resolve(ServerConfig(), CPU).config
    assert resolve(once, CPU).config == once


def test_the_default_chunk_stays_within_the_prefill_limit():
    assert resolve(ServerConfig(max_prefill_tokens=100), CPU).config.chunked_prefill_size == 100


def test_little_memory_means_smaller_chunks_on_a_cpu():
    for machine, chunk in ((CPU, 256), (GPU, 8192)):
        assert resolve(ServerConfig(low_memory=True), machine).config.chunked_prefill_size == chunk
    assert resolve(ServerConfig(low_memory=True, chunked_prefill_size=64), CPU).config.chunked_prefill_size == 64


def test_triton_on_a_cpu_is_replaced_and_said_so():
    resolution = resolve(ServerConfig(attention_backend="triton"), CPU)
    assert resolution.config.attention_backend == "torch_native"
    assert any("triton needs a GPU" in note for note in resolution.notes)


def test_a_flag_without_effect_is_accepted_and_said_so():
    notes = resolve(ServerConfig(cuda_graph_max_bs=4), CPU).notes
    assert ["--cuda-graph-max-bs has no effect" in note for note in notes] == [True]


@pytest.mark.parametrize(
    ("flag", "variable", "expected"), [(None, None, "/tmp"), (None, "/env", "/env"), ("/flag", "/env", "/flag")]
)
def test_recordings_of_experts_go_where_the_flag_or_else_the_environment_says(flag, variable, expected):
    machine = Machine(recorder_dir=variable) if variable else CPU
    config = resolve(ServerConfig(expert_distribution_recorder_dir=flag), machine).config
    assert config.expert_distribution_recorder_dir == expected


def test_the_environment_names_the_directory_of_recordings(monkeypatch):
    monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", "/elsewhere")
    assert look_at_machine().recorder_dir == "/elsewhere"


@pytest.mark.parametrize(
    ("host", "api_key", "warned"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("0.0.0.0", "k", False),
        ("example.org", None, True),
    ],
)
def test_an_address_open_to_the_network_needs_a_key_or_is_warned_about(host, api_key, warned):
    notes = resolve(ServerConfig(host=host, api_key=api_key), CPU).notes
    assert any("no --api-key is set" in note for note in notes) is warned


@pytest.mark.parametrize(("hosts", "warned"), [(None, True), ("*", True), ("llm.example.org", False)])
def test_the_warning_names_web_pages_where_any_host_is_answered(hosts, warned):
    notes = resolve(ServerConfig(host="0.0.0.0", allowed_hosts=hosts), CPU).notes
    (warning,) = [note for note in notes if "no --api-key is set" in note]
    assert ("any web page" in warning) is ("--allowed-hosts" in warning) is warned


@pytest.mark.parametrize("schema", [{"type": "object"}, '{"type": "object"}'])
def test_preferred_parameters_take_a_schema_as_text_or_as_the_object(schema):
    resolve(ServerConfig(preferred_sampling_params=json.dumps({"json_schema": schema})), CPU)


@pytest.mark.parametrize(
    ("settings", "machine", "remedy"),
    [
        ({"device": "cuda"}, CPU, "use --device cpu"),
        ({"device": "cuda"}, Machine(torch_has_cuda=True), "none is loaded here; use --device cpu"),
        ({"chunked_prefill_size": 0}, CPU, "use -1 for whole prompts"),
        ({"expert_distribution_recorder_buffer_size": 0}, CPU, "use -1 for all"),
        ({"chunked_prefill_size": 512, "max_prefill_tokens": 256}, CPU, "use --max-prefill-tokens 512"),
        ({"max_total_tokens": 8}, CPU, "use --page-size 8 or less"),
        ({"disable_cuda_graph": True, "cuda_graph_max_bs": 4}, CPU, "leave one of them out"),
        ({"revision": "main"}, CPU, "leave --revision out"),
        ({"skip_tokenizer_init": True, "chat_template": "t"}, CPU, "leave --tokenizer-path and --chat-template out"),
        ({"speculative_algorithm": "EAGLE"}, CPU, "Quartet runs no draft model; use NGRAM"),
        ({"speculative_num_draft_tokens": 4}, CPU, "--speculative-num-draft-tokens has no effect without speculation"),
        ({"speculative_ngram_max_match_window_size": 4}, CPU, "add --speculative-algorithm NGRAM"),
        (
            {
                "speculative_algorithm": "NGRAM",
                "speculative_ngram_min_match_window_size": 4,
                "speculative_ngram_max_match_window_size": 3,
            },
            CPU,
            "--speculative-ngram-min-match-window-size 4 exceeds --speculative-ngram-max-match-window-size 3",
        ),
        ({"speculative_algorithm": "NGRAM", "is_embedding": True}, CPU, "leave one of them out"),
        (
            {"speculative_algorithm": "NGRAM", "expert_distribution_recorder_mode": "stat"},
            CPU,
            "leave --speculative-algorithm out",
        ),
        (
            {"tp_size": 2, "enable_deterministic_inference": True, "attention_backend": "torch_native"},
            GPU,
            "needs the triton backend, which --tp-size 2 does not have",
        ),
        (
            {"tp_size": 2, "dp_size": 2, "nnodes": 2, "dist_init_addr": "a:1"},
            CPU,
            "--dp-size 2 works on one machine, and --nnodes is 2",
        ),
        ({"tp_size": 2}, GPU, "add it"),
        ({"tp_size": 3, "nnodes": 2, "dist_init_addr": "a:1"}, CPU, "--tp-size 3 cannot be divided among --nnodes 2"),
        ({"tp_size": 2, "nnodes": 2, "node_rank": 2, "dist_init_addr": "a:1"}, CPU, "count from 0"),
        ({"tp_size": 2, "nnodes": 2}, CPU, "--nnodes 2 needs --dist-init-addr HOST:PORT"),
        ({"tp_size": 2, "nnodes": 2, "dist_init_addr": "a"}, CPU, "not 'a'"),
        ({"hicache_ratio": 2.0}, CPU, "no effect without --enable-hierarchical-cache; add it"),
        ({"hicache_size": 4}, CPU, "no effect without --enable-hierarchical-cache; add it"),
        ({"kv_cache_dir_size": 4}, CPU, "--kv-cache-dir-size has no effect without --kv-cache-dir"),
        ({"kv_cache_dir": "d", "disable_radix_cache": True}, CPU, "keeps what --disable-radix-cache turns off"),
        ({"kv_cache_dir": "d", "is_embedding": True}, CPU, "--kv-cache-dir is for models that generate"),
        ({"tp_size": 2, "dist_init_addr": "a:1"}, CPU, "--dist-init-addr has no effect on one machine"),
        ({"preferred_sampling_params": "{"}, CPU, "must be a JSON object"),
        ({"preferred_sampling_params": '{"temprature": 1}'}, CPU, "temprature"),
    ],
)
def test_a_contradiction_is_refused_with_the_value_that_mends_it(settings, machine, remedy):
    with pytest.raises(StartupError) as refused:
        resolve(ServerConfig(**settings), machine)
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


def test_priority_scheduling_is_the_priority_policy():
    assert resolve(ServerConfig(enable_priority_scheduling=True), CPU).config.schedule_policy == "priority"
    with pytest.raises(StartupError, match="contradict each other"):
        resolve(ServerConfig(enable_priority_scheduling=True, schedule_policy="lpm"), CPU)


@pytest.mark.parametrize(
    ("settings", "noted"),
    [({}, True), ({"enable_priority_scheduling": True}, False), ({"schedule_policy": "priority"}, False)],
)
def test_the_order_of_priorities_has_no_effect_without_their_policy_and_that_is_said(settings, noted):
    notes = resolve(ServerConfig(schedule_low_priority_values_first=True, **settings), CPU).notes
    assert any("--schedule-low-priority-values-first has no effect" in note for note in notes) is noted


def test_the_host_tier_is_twice_the_pool_where_it_is_on_and_a_cpu_hears_of_its_use():
    resolution = resolve(ServerConfig(enable_hierarchical_cache=True), CPU)
    assert resolution.config.hicache_ratio == 2.0 and resolution.config.has_kv_tier
    assert ["--enable-hierarchical-cache keeps KV in the memory" in note for note in resolution.notes] == [True]
    assert not resolve(ServerConfig(), CPU).config.has_kv_tier
