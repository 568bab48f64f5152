"""Settings: presets, the three ways to set one, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pgolf.config import ALIASES, FIELDS, PRESETS, READ_BY_QUANTIZER, ConfigError, RunConfig, nearest_field

PR_1874_COMMAND = (
    "SEED=1337 QK_GAIN_INIT=5.25 SMEAR_GATE=1 GATE_ATTN_OUT=1 GATE_ATTN_WIDTH=24 GPTQ_RESERVE_SECONDS=4 "
    "GPTQ_CALIBRATION_BATCHES=16 POLAR_EXPRESS_NS=1 MIN_LR=0.10 LQER_ENABLED=1 LQER_RANK=4 LQER_TOP_K=3 "
    "LQER_GROUP_SIZE=64"
)
PR_1874_VARIABLES = """
    DATA_DIR SEED RUN_ID ITERATIONS WARMDOWN_FRAC WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN TRAIN_LOG_EVERY
    MAX_WALLCLOCK_SECONDS VAL_BATCH_TOKENS EVAL_SEQ_LEN VAL_LOSS_EVERY SLIDING_WINDOW_ENABLED EVAL_STRIDE VOCAB_SIZE
    NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT XSA_LAST_N SKIP_GATES_ENABLED TIE_EMBEDDINGS LOGIT_SOFTCAP
    ROPE_BASE ROPE_DIMS ROPE_TRAIN_SEQ_LEN ROPE_YARN LN_SCALE QK_GAIN_INIT NUM_LOOPS LOOP_START LOOP_END
    ENABLE_LOOPING_AT PARALLEL_START_LAYER PARALLEL_FINAL_LANE MIN_LR EMBED_LR TIED_EMBED_LR TIED_EMBED_INIT_STD
    MATRIX_LR SCALAR_LR SMEAR_GATE SMEAR_GATE_WIDTH GATE_ATTN_OUT GATE_ATTN_WIDTH CONTROL_TENSOR_NAME_PATTERNS
    MUON_MOMENTUM MUON_BACKEND_STEPS MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS MUON_ROW_NORMALIZE
    POLAR_EXPRESS_NS BETA1 BETA2 ADAM_EPS GRAD_CLIP_NORM ADAM_WD MUON_WD EMBED_WD EMA_DECAY TTT_ENABLED TTT_LORA_RANK
    TTT_LORA_ALPHA TTT_WARM_START_A TTT_LORA_LR TTT_CHUNK_SIZE TTT_EVAL_SEQ_LEN TTT_BATCH_SIZE TTT_GRAD_STEPS
    TTT_WEIGHT_DECAY TTT_BETA1 TTT_BETA2 TTT_K_LORA TTT_MLP_LORA TTT_O_LORA TTT_OPTIMIZER TTT_EVAL_BATCHES
    VAL_DOC_FRACTION COMPRESSOR GPTQ_CALIBRATION_BATCHES GPTQ_RESERVE_SECONDS PHASED_TTT_ENABLED
    PHASED_TTT_PREFIX_DOCS PHASED_TTT_NUM_PHASES GLOBAL_TTT_LR GLOBAL_TTT_MOMENTUM GLOBAL_TTT_EPOCHS
    GLOBAL_TTT_CHUNK_TOKENS GLOBAL_TTT_BATCH_SEQS GLOBAL_TTT_WARMUP_START_LR GLOBAL_TTT_WARMUP_CHUNKS
    GLOBAL_TTT_GRAD_CLIP GLOBAL_TTT_RESPECT_DOC_BOUNDARIES MATRIX_BITS EMBED_BITS MATRIX_CLIP_SIGMAS
    EMBED_CLIP_SIGMAS MLP_CLIP_SIGMAS ATTN_CLIP_SIGMAS LQER_ENABLED LQER_RANK LQER_TOP_K LQER_FACTOR_BITS
    LQER_ASYM_ENABLED LQER_ASYM_GROUP ARTIFACT_DIR
"""
ORDINARY_VARIABLES = """
    PATH HOME LANG LC_ALL USER SHELL TERM PWD OLDPWD SHLVL TMPDIR TZ HOSTNAME LOGNAME EDITOR PAGER MAIL DISPLAY
    LD_LIBRARY_PATH LD_PRELOAD PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED VIRTUAL_ENV CONDA_PREFIX
    CONDA_DEFAULT_ENV PIP_INDEX_URL XDG_DATA_HOME XDG_DATA_DIRS XDG_CONFIG_DIRS DBUS_SESSION_BUS_ADDRESS
    SSH_CLIENT SSH_CONNECTION SSH_TTY http_proxy HTTPS_PROXY NO_PROXY CI GITHUB_ACTIONS GITHUB_WORKSPACE
    CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING NVIDIA_VISIBLE_DEVICES
    NVIDIA_DRIVER_CAPABILITIES NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_DISABLE NCCL_P2P_DISABLE NCCL_NVLS_ENABLE
    OMP_NUM_THREADS MKL_NUM_THREADS KMP_AFFINITY OPENBLAS_NUM_THREADS NUMEXPR_MAX_THREADS
    TORCH_HOME TORCH_LOGS TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_CUDA_ARCH_LIST TORCHINDUCTOR_CACHE_DIR
    TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS PYTORCH_CUDA_ALLOC_CONF
    TRITON_CACHE_DIR TRITON_INTERPRET TRITON_PRINT_AUTOTUNING TRITON_LIBCUDA_PATH
    KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT KUBERNETES_PORT_443_TCP_ADDR
    SLURM_JOB_ID SLURM_PROCID SLURM_NTASKS SLURM_NODELIST SLURM_CPUS_PER_TASK
    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT
    HF_HOME HF_TOKEN HF_HUB_OFFLINE WANDB_API_KEY WANDB_PROJECT DATA_PATH TOKENIZER_PATH MODEL_PATH MODEL_NAME
    DEVICE COMPILE KERNELS PGOLF_KERNELS RUNPOD_POD_ID SETUPTOOLS_SCM_PRETEND_VERSION _ PS1
"""
RECORD_VALUES = dict(
    seed=1337,
    iterations=20_000,
    warmdown_frac=0.75,
    warmup_steps=20,
    train_batch_tokens=786_432,
    train_seq_len=2048,
    max_wallclock_seconds=600.0,
    vocab_size=8192,
    num_layers=11,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    mlp_mult=4.0,
    qk_gain_init=5.25,
    gate_attn_width=24,
    min_lr=0.1,
    matrix_lr=0.026,
    scalar_lr=0.02,
    tied_embed_lr=0.03,
    muon_momentum=0.97,
    muon_wd=0.095,
    beta2=0.95,
    grad_clip_norm=0.3,
    ema_decay=0.9965,
    matrix_bits=6,
    embed_bits=7,
    matrix_clip_sigmas=12.85,
    lqer_asym_group=64,
    ttt_lora_rank=128,
    ttt_lora_alpha=144.0,
    ttt_chunk_size=48,
    phased_ttt_prefix_docs=2000,
    global_ttt_chunk_tokens=32_768,
    gptq_reserve_seconds=4.0,
)


def test_record_values() -> None:
    record = RunConfig.preset("record")
    assert {name: getattr(record, name) for name in RECORD_VALUES} == RECORD_VALUES
    assert record == RunConfig() and record.head_dim == 64 and record.mlp_dim == 2048


def test_every_variable_of_pr_1874_is_a_field() -> None:
    assert [name for name in PR_1874_VARIABLES.split() if name.lower() not in FIELDS] == []
    assert len(set(PR_1874_VARIABLES.split())) == 108


def test_public_preset_differs_only_where_defects_were_mended() -> None:
    record, public = (dataclasses.asdict(RunConfig.preset(name)) for name in ("record", "public_1874"))
    changed = {name for name in record if record[name] != public[name]} - {"preset_name"}
    assert changed == set(PRESETS["public_1874"])
    assert not changed & {name.lower() for name in PR_1874_VARIABLES.split()}


def test_demo_keeps_the_structure() -> None:
    demo, record = RunConfig.preset("demo"), RunConfig.preset("record")
    for name in ("num_layers", "num_loops", "loop_start", "loop_end", "parallel_start_layer", "tie_embeddings"):
        assert getattr(demo, name) == getattr(record, name)
    assert demo.data_source == "embedded" and demo.max_wallclock_seconds <= 120


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    preset = RunConfig.preset(name)
    assert preset.preset_name == name
    assert RunConfig().replace(**json.loads(preset.to_json())) == preset


def test_pr_1874_command_line_changes_nothing() -> None:
    environ = dict(assignment.split("=") for assignment in PR_1874_COMMAND.split())
    assert RunConfig.preset("record").from_env(environ) == RunConfig.preset("record")


def test_environment_sets_fields_of_every_type() -> None:
    environ = {"TTT_LORA_RANK": "96", "MIN_LR": "5e-2", "SMEAR_GATE": "0", "COMPRESSOR": "lzma", "PATH": "/bin"}
    config = RunConfig.preset("demo").from_env(environ)
    assert (config.ttt_lora_rank, config.min_lr, config.smear_gate, config.compressor) == (96, 0.05, False, "lzma")
    assert config.preset_name == "demo" and config.model_dim == 96
    assert RunConfig.from_env({"SEED": "7"}) == RunConfig(seed=7)


def test_from_env_reads_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LQER_GROUP_SIZE", "32")
    assert RunConfig.from_env().lqer_asym_group == 32


def test_ordinary_environment_raises_nothing() -> None:
    assert RunConfig.from_env(dict.fromkeys(ORDINARY_VARIABLES.split(), "anything")) == RunConfig()


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("TTT_LORA_RANKS", "ttt_lora_rank"),
        ("LQER_GROUPSIZE", "lqer_group_size"),
        ("MATRX_LR", "matrix_lr"),
        ("WARMDOWN_FRACTION", "warmdown_frac"),
        ("GPTQ_RESERVE_SECS", "gptq_reserve_seconds"),
    ],
)
def test_slips_in_the_environment_are_errors(variable: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"{variable} looks like a setting.*nearest: .*{nearest}.*unset {variable}"):
        RunConfig.from_env({variable: "1"})


def test_bad_values_in_the_environment_name_the_setting() -> None:
    with pytest.raises(ConfigError, match="ttt_lora_rank must be int, and 'many' is none"):
        RunConfig.from_env({"TTT_LORA_RANK": "many"})


def test_whole_numbers_keep_every_digit() -> None:
    for value in ("9007199254740993", 9007199254740993, " 9_007_199_254_740_993 "):
        assert RunConfig().replace(seed=value).seed == 9007199254740993
    assert RunConfig().replace(iterations="2e3", seed=3.0).iterations == 2000
    for value in ("1e30", 2**63, "9" * 5000, "0.5", "-1"):
        with pytest.raises(ConfigError, match="seed must be"):
            RunConfig().replace(seed=value)


def test_replace_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no setting 'warmup_step'; nearest: warmup_steps"):
        RunConfig().replace(warmup_step=3)
    with pytest.raises(ConfigError, match="`pgolf config` lists them all"):
        RunConfig().replace(zzz=3)
    assert "min_lr" in nearest_field("MIN_LRS")


def test_replace_checks_its_result_and_leaves_the_original() -> None:
    record = RunConfig()
    assert record.replace(model_dim="1_024", num_heads=16).model_dim == 1024
    assert record.model_dim == 512
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.model_dim = 1  # type: ignore[misc]


def test_alias_and_its_field_must_agree() -> None:
    assert ALIASES["lqer_group_size"] == "lqer_asym_group"
    assert RunConfig().replace(lqer_group_size=32, lqer_asym_group=32).lqer_asym_group == 32
    with pytest.raises(ConfigError, match="different values"):
        RunConfig().replace(lqer_group_size=32, lqer_asym_group=16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compressor": "zip"}, "compressor must be one of brotli, lzma"),
        ({"matrix_bits": 9}, "matrix_bits must be at most 8"),
        ({"matrix_bits": 1}, "matrix_bits must be at least 2"),
        ({"min_lr": -0.1}, "min_lr must be at least 0"),
        ({"min_lr": "nan"}, "min_lr must be float"),
        ({"min_lr": "inf"}, "min_lr must be float"),
        ({"seed": 1.5}, "seed must be int"),
        ({"seed": True}, "seed must be int"),
        ({"smear_gate": 2}, "smear_gate must be bool"),
        ({"data_dir": 3}, "data_dir must be str"),
        ({"num_heads": 7}, "model_dim 512 must be a multiple of num_heads 7"),
        ({"num_kv_heads": 3}, "num_heads 8 must be a multiple of num_kv_heads 3"),
        ({"rope_dims": 15}, "rope_dims 15 must be even"),
        ({"rope_dims": 66}, "at most the head dimension 64"),
        ({"loop_end": 11}, "loop_end 11 < num_layers 11 must hold"),
        ({"gate_attn_width": 600}, "must not exceed model_dim 512"),
        ({"trellis_rows": 24}, "trellis_rows 24 must be a multiple of 16"),
        ({"key_offset": True, "rope_dims": 64}, "that do not rotate, and rope_dims 64 leaves none"),
        ({"mlp_gate": True, "mlp_gate_width": 512}, "mlp_gate_width 512 must be less than model_dim 512"),
        ({"loop_mixing": "1:0:0,1:0:0"}, "loop_mixing must be β:α:α… with 3 α for each of 3"),
        ({"loop_mixing": "1:0:x:0,1:1:0:0,1:0:0:0"}, "loop_mixing must be"),
        ({"loop_mixing": "1:0", "loop_start": 8, "loop_end": 8}, "loop_end < parallel_start_layer"),
        ({"micro_batch_tokens": 100_000}, "must be a multiple of micro_batch_tokens 100000"),
        ({"logit_softcap_negative": 1e-7}, "logit_softcap_negative 1e-07 must be 0 or at least 1e-06"),
        ({"gptq_reserve_seconds": 600}, "leaves nothing of max_wallclock_seconds"),
    ],
)
def test_values_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig().replace(**fields)


def test_mixing_by_layer() -> None:
    assert RunConfig().mixing_by_layer() == RunConfig().replace(loop_mixing=" ").mixing_by_layer() == {}
    config = RunConfig().replace(loop_start=2, loop_end=3, loop_mixing="1.5:.2:-0.1, 2:0:1e-1")
    assert config.mixing_by_layer() == {2: [1.5, 0.2, -0.1], 3: [2.0, 0.0, 0.1]}


def test_step_schedule_needs_no_reserve() -> None:
    assert RunConfig().replace(max_wallclock_seconds=0).gptq_reserve_seconds == 4.0


def test_gradient_accumulation() -> None:
    record = RunConfig()
    assert [record.gradient_accumulation(world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match="cannot be dealt evenly to 3 processes"):
        record.gradient_accumulation(3)


def test_unknown_presets_and_json_fields() -> None:
    with pytest.raises(ConfigError, match="presets: record, public_1874, frontier, demo"):
        RunConfig.preset("recrod")
    with pytest.raises(ConfigError, match="no setting 'colour'"):
        RunConfig().replace(colour=1)


def test_every_field_has_a_help_text_and_a_legal_default() -> None:
    for name, spec in FIELDS.items():
        assert len(spec.metadata["help"]) > 5, name
        assert not spec.metadata["choices"] or spec.default in spec.metadata["choices"], name


def test_a_quantizer_s_settings_are_known() -> None:
    trellis, public = RunConfig.preset("record"), RunConfig.preset("public_1874")
    assert trellis.reads("weight_bytes") and not trellis.reads("lqer_rank") and trellis.reads("seed")
    assert public.reads("lqer_rank") and not public.reads("weight_bytes")
    assert all(name in FIELDS for names in READ_BY_QUANTIZER.values() for name in names)
