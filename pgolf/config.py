"""The settings of a run: one frozen dataclass whose fields are the challenge's own variables.

The field ``ttt_lora_rank`` is set by ``--set ttt_lora_rank=96``, by the environment variable ``TTT_LORA_RANK`` or by
``config.replace(ttt_lora_rank=96)``. Fields in ``NOT_FROM_ENVIRONMENT`` have no environment variable. Unknown names,
wrong types and values out of range raise ConfigError with a message that says what to do.

The defaults are the record values of parameter-golf PR #1874 with the defects of its code corrected. Where a correction
changes numbers, a field restores the original behaviour; the preset ``public_1874`` sets all of these.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ALIASES = {"lqer_group_size": "lqer_asym_group"}  # PR #1874's command line says the former; its code read the latter
# Other programs use variables of these names, so none of them sets a field. PGOLF_KERNELS overrides ``kernels``.
NOT_FROM_ENVIRONMENT = ("device", "cuda_graphs", "kernels", "preset_name")
CONTROL_TENSORS = (
    "attn_scale,mlp_scale,resid_mix,q_gain,attn_gate_proj,mlp_gate,skip_weights,skip_gates,parallel_post_lambdas,"
    "parallel_resid_lambdas,smear_gate,smear_lambda"
)

# The settings that one quantizer alone reads: the challenge's command lines set gptq's whatever the quantizer.
READ_BY_QUANTIZER = {
    "trellis": (
        *("weight_bytes", "trellis_states", "trellis_rows", "trellis_shrink"),
        *("trellis_row_steps", "trellis_column_steps", "sensitivity_sequences", "sensitivity_tokens"),
    ),
    "gptq": (
        *("matrix_bits", "attn_bits", "mlp_bits", "embed_bits"),
        *("matrix_clip_sigmas", "embed_clip_sigmas", "mlp_clip_sigmas", "attn_clip_sigmas"),
        *("lqer_enabled", "lqer_rank", "lqer_top_k", "lqer_weighted", "lqer_factor_bits"),
        *("lqer_asym_enabled", "lqer_asym_group", "awq_groups", "compressor"),
    ),
}


class ConfigError(ValueError):
    """A setting does not exist, or its value is not allowed."""


def _field(default: Any, help: str, *, choices: tuple = (), low: float | None = None, high: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


class _FromEnv:
    """Makes ``RunConfig.from_env()`` start from the defaults and ``config.from_env()`` from ``config``."""

    def __get__(self, instance: RunConfig | None, owner: type[RunConfig]) -> Callable[..., RunConfig]:
        start = owner() if instance is None else instance

        def from_env(environ: Mapping[str, str] | None = None) -> RunConfig:
            """Apply every environment variable whose name is a field's or an alias's in upper case.

            Raises ConfigError for a bad value, and for a variable that resembles a setting's name but is none.
            """
            return _apply_environment(start, os.environ if environ is None else environ)

        return from_env


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run; see the module's docstring for the three ways to set one."""

    # The run
    run_id: str = _field("", "name of the run's folder; empty: preset and time of day")
    preset_name: str = _field("record", "preset this configuration started from (recorded, not set by hand)")
    seed: int = _field(1337, "seed of python, numpy and torch", low=0, high=2**63 - 1)
    artifact_dir: str = _field("", "where the artifact is written; empty: the run's folder")
    device: str = _field("auto", "device of the run; auto: CUDA where there is a GPU", choices=("auto", "cpu", "cuda"))
    dist_timeout_seconds: float = _field(
        120.0, "seconds without a sign of life from one process after which the others end", low=1.0
    )
    compute_dtype: str = _field(
        "auto", "dtype of activations; auto: bfloat16 on CUDA, float32 on CPU", choices=("auto", "float32", "bfloat16")
    )
    cuda_graphs: str = _field(
        "auto",
        "replay a micro-batch's launches as one CUDA graph; auto: where kernels make up the model",
        choices=("auto", "on", "off"),
    )
    kernels: str = _field(
        "auto",
        "which code computes the kernel families (PGOLF_KERNELS overrides); auto: Triton on CUDA",
        choices=("auto", "reference", "triton"),
    )
    attention_backend: str = _field(
        "auto",
        "code of attention: our Triton kernel, PyTorch's FlashAttention, or SDPA by segment; auto: the best there is",
        choices=("auto", "triton", "flash", "sdpa"),
    )

    # Data
    data_dir: str = _field("./data/", "folder with datasets/ and tokenizers/")
    data_source: str = _field(
        "shards",
        "shards: what lies in data_dir; embedded: build shards from the text every Python carries when there are none",
        choices=("shards", "embedded"),
    )
    vocab_size: int = _field(8192, "tokens in the vocabulary; names the dataset and tokenizer files", low=260)
    case_coding: bool = _field(
        False, "the documents are case-coded (CaseOps): capitals as operators, bytes counted by sidecars"
    )
    train_batch_tokens: int = _field(786_432, "tokens of one optimizer step, over all ranks", low=1)
    micro_batch_tokens: int = _field(98_304, "tokens of one forward and backward pass on one rank", low=1)
    train_seq_len: int = _field(2048, "longest attention segment in training, tokens", low=2)
    train_seq_schedule: str = _field(
        "",
        "longest segments up to fractions of training, like 1024@0.1,2048@0.7,3072@1 with train_seq_len 3072; empty: "
        "train_seq_len throughout",
    )
    eval_seq_len: int = _field(2048, "window of the evaluation, tokens", low=2)
    val_batch_tokens: int = _field(
        524_288, "tokens of one evaluation batch over 8 ranks; a rank takes an eighth", low=1
    )
    val_doc_fraction: float = _field(
        1.0, "fraction of validation documents to score, the first ones", low=0.0, high=1.0
    )
    eval_public_truncation: bool = _field(
        False, "drop the validation tail that the public evaluation drops (whole windows, then whole batches)"
    )

    # Model
    num_layers: int = _field(11, "physical layers", low=1)
    model_dim: int = _field(512, "width of the residual stream", low=1)
    num_heads: int = _field(8, "query heads", low=1)
    num_kv_heads: int = _field(4, "key and value heads", low=1)
    mlp_mult: float = _field(4.0, "hidden width of the MLP over model_dim", low=0.0)
    mlp_negative_slope: float = _field(
        0.5, "slope of the MLP's leaky_relu² below 0 (0.3 in #1948; 0 is relu²)", low=0.0, high=1.0
    )
    xsa_last_n: int = _field(11, "layers, counted from the last, that remove the own value from attention (XSA)", low=0)
    skip_gates_enabled: bool = _field(True, "skips join by a gated lerp; off: they are added")
    tie_embeddings: bool = _field(True, "the head is the embedding; off: the head has its own matrix, started at zero")
    logit_softcap: float = _field(30.0, "c of the logits c tanh(z / c)", low=1e-6, high=1e30)
    logit_softcap_negative: float = _field(
        0.0, "c of the logits c tanh(z / c) for negative z (AsymLogit, #1923); 0: logit_softcap", low=0.0, high=1e30
    )
    rope_base: float = _field(10_000.0, "rotary base", low=1.0)
    rope_dims: int = _field(16, "leading head dimensions that rotate", low=0)
    rope_train_seq_len: int = _field(2048, "with rope_yarn: positions beyond it stretch the rotary base", low=1)
    rope_yarn: bool = _field(False, "stretch the rotary base for streams longer than rope_train_seq_len")
    rope_reset_per_segment: bool = _field(False, "rotary positions start at 0 in every segment, not once a stream")
    key_offset: bool = _field(
        False, "keys' dimensions that do not rotate come one token late (partial key offset, modded-nanogpt)"
    )
    ln_scale: bool = _field(True, "scale block inputs by 1/sqrt(layer + 1)")
    qk_gain_init: float = _field(5.25, "start of the gain on every query head")
    num_loops: int = _field(2, "extra passes through layers loop_start..loop_end once looping is on", low=0)
    loop_start: int = _field(3, "first looped layer", low=0)
    loop_end: int = _field(5, "last looped layer", low=0)
    loop_mixing: str = _field(
        "",
        "of each looped layer β:α:α…, comma-separated: its extra passes end as β times their output plus α times every "
        "layer's first one (#1779); empty: none",
    )
    enable_looping_at: float = _field(0.35, "fraction of training at which looping starts", low=0.0)
    parallel_start_layer: int = _field(8, "first layer with attention and MLP in two parallel lanes", low=0)
    parallel_final_lane: str = _field(
        "mean", "output of the two parallel lanes: their mean or one of them", choices=("mean", "mlp", "attn")
    )
    smear_gate: bool = _field(True, "add the gated previous embedding to each embedding")
    smear_gate_width: int = _field(12, "embedding dimensions the smear gate reads", low=1)
    smear_gate_bos_mask: bool = _field(True, "a document's first token gets nothing from the document before it")
    gate_attn_out: bool = _field(True, "gate every attention head's output")
    gate_attn_width: int = _field(24, "input dimensions the attention output gate reads", low=1)
    mlp_gate: bool = _field(False, "gate every token's MLP output by the first dimensions of the MLP's input (#1941)")
    mlp_gate_width: int = _field(12, "input dimensions the MLP output gate reads, fewer than model_dim", low=1)
    tied_embed_init_std: float = _field(0.005, "standard deviation of the embedding's start", low=0.0)
    embed_fp32_master: bool = _field(
        True, "keep the embedding and its moments in fp32; off: bfloat16, as the public code"
    )

    # Optimizer
    matrix_lr: float = _field(0.026, "learning rate of the matrix banks (Muon)", low=0.0)
    scalar_lr: float = _field(0.02, "learning rate of gains, scales and gates (AdamW)", low=0.0)
    tied_embed_lr: float = _field(0.03, "learning rate of the tied embedding, or of the untied head (AdamW)", low=0.0)
    embed_lr: float = _field(0.6, "learning rate of an untied embedding (AdamW)", low=0.0)
    muon_momentum: float = _field(0.97, "Muon's momentum after its warm-up", low=0.0, high=1.0)
    muon_momentum_warmup_start: float = _field(0.92, "Muon's momentum at step 0", low=0.0, high=1.0)
    muon_momentum_warmup_steps: int = _field(1500, "steps over which Muon's momentum rises", low=0)
    muon_backend_steps: int = _field(5, "Newton-Schulz steps of Muon", low=1)
    polar_express_ns: bool = _field(True, "Polar Express coefficients; off: (3.4445, -4.775, 2.0315) every step")
    muon_row_normalize: bool = _field(True, "normalise rows before Newton-Schulz (MuonEq-R)")
    muon_wd: float = _field(0.095, "weight decay of the matrix banks", low=0.0)
    newton_muon: bool = _field(
        False, "multiply the banks' gradients by the inverse second moment of the layers' inputs (Newton-Muon)"
    )
    newton_muon_every: int = _field(32, "steps between Newton-Muon's measurements of the inputs' second moment", low=1)
    newton_muon_decay: float = _field(
        0.95, "decay a measurement of Newton-Muon's average of the inputs' second moment", low=0.0, high=1.0
    )
    newton_muon_ridge: float = _field(
        0.2, "ridge of Newton-Muon's second moment, over the mean of the diagonal", low=0.01
    )
    beta1: float = _field(0.9, "decay of AdamW's first moment", low=0.0, high=1.0)
    beta2: float = _field(0.95, "decay of AdamW's second moment", low=0.0, high=1.0)
    adam_eps: float = _field(1e-8, "AdamW's epsilon", low=0.0)
    adam_wd: float = _field(0.02, "weight decay of gains, scales and gates", low=0.0)
    embed_wd: float = _field(0.085, "weight decay of the embedding", low=0.0)
    grad_clip_norm: float = _field(0.3, "clip the norm of the reduced gradient; 0: off", low=0.0)
    wd_taper_final_mult: float = _field(
        1.0, "factor to which the weight decay of banks, gains, scales and gates falls, linearly, by the end", low=0.0
    )
    wd_taper_start_frac: float = _field(
        0.7, "fraction of training at which the weight decay begins to fall", low=0.0, high=1.0
    )
    ema_decay: float = _field(0.9965, "decay of the weights' moving average", low=0.0, high=1.0)
    swa_blend: float = _field(
        0.0, "share of the mean of snapshots (SWA) in the average at the end of training", low=0.0, high=1.0
    )
    swa_window_frac: float = _field(0.05, "last fraction of training, in which snapshots (SWA) are taken", low=0.0)
    swa_interval: int = _field(50, "steps between snapshots (SWA); the window's first step always gives one", low=1)
    average_tuning: float = _field(
        0.0,
        "last fraction of training, in which the average's gains, scales and gates are tuned",
        low=0.0,
        high=0.5,
    )
    average_tuning_lr: float = _field(1e-3, "learning rate of the average's tuning (AdamW), linear to 0", low=0.0)

    # Schedule
    iterations: int = _field(20_000, "most optimizer steps", low=1)
    max_wallclock_seconds: float = _field(600.0, "training's clock; 0: schedule by step", low=0.0)
    gptq_reserve_seconds: float = _field(4.0, "seconds of training's clock kept for the calibration passes", low=0.0)
    warmdown_frac: float = _field(
        0.75, "last fraction of training, over which the learning rate falls", low=0.0, high=1.0
    )
    min_lr: float = _field(0.10, "floor of the learning-rate scale", low=0.0, high=1.0)
    warmup_steps: int = _field(20, "untimed steps in each loop state, undone before the clock starts", low=0)
    train_log_every: int = _field(500, "steps between printed lines; metrics.jsonl has every step", low=1)
    val_loss_every: int = _field(4000, "steps between validations in training; 0: only the last", low=0)
    checkpoint_minutes: float = _field(0.0, "minutes between training checkpoints; 0: only on SIGTERM", low=0.0)

    # Evaluation
    sliding_window_enabled: bool = _field(False, "also score with a window that slides by eval_stride")
    eval_stride: int = _field(64, "tokens the sliding window moves", low=1)

    # Quantisation and artifact
    quantizer: str = _field(
        "trellis",
        "trellis: steps by sensitivity, codes on a trellis, to a number of bytes; gptq: one clip a class, as public",
        choices=("trellis", "gptq"),
    )
    weight_bytes: int = _field(0, "bytes of the trellis artifact; 0: what the program leaves of the cap", low=0)
    trellis_states: int = _field(128, "states of the trellis; 1: none", choices=(1, 4, 8, 16, 32, 64, 128))
    trellis_rows: int = _field(512, "rows of a path through the trellis, a multiple of 16", low=16)
    trellis_row_steps: bool = _field(
        True, "rows have steps of their own; off: one for a matrix, within each row's bounds"
    )
    trellis_column_steps: bool = _field(True, "a step for every column, by its pivot; off: one for all")
    trellis_shrink: float = _field(
        0.0,
        "strength at which targets are drawn to 0 for shorter codes (rate-distortion optimised rounding); 1: best for "
        "a Gaussian distribution",
        low=0.0,
    )
    sensitivity_sequences: int = _field(
        256, "training sequences whose gradients give the sensitivities to rounding", low=1
    )
    sensitivity_tokens: int = _field(512, "tokens of a sequence for the sensitivities", low=1)
    matrix_bits: int = _field(6, "bits of matrices with quantizer=gptq", low=2, high=8)
    attn_bits: int = _field(0, "bits of attention matrices; 0: matrix_bits", choices=(0, 2, 3, 4, 5, 6, 7, 8))
    mlp_bits: int = _field(0, "bits of MLP matrices; 0: matrix_bits", choices=(0, 2, 3, 4, 5, 6, 7, 8))
    embed_bits: int = _field(7, "bits of the embedding", low=2, high=8)
    matrix_clip_sigmas: float = _field(
        12.85, "clip of matrices that are neither attention nor MLP, in row standard deviations", low=0.0
    )
    embed_clip_sigmas: float = _field(15.0, "clip of the embedding, in row standard deviations", low=0.0)
    mlp_clip_sigmas: float = _field(12.0, "clip of MLP matrices, in row standard deviations", low=0.0)
    attn_clip_sigmas: float = _field(13.0, "clip of attention matrices, in row standard deviations", low=0.0)
    gptq_calibration_batches: int = _field(16, "calibration batches of a rank", low=1)
    gptq_calibration_tokens: int = _field(98_304, "tokens of one calibration batch", low=1)
    gptq_passthrough_numel: int = _field(65_536, "tensors up to this many numbers are kept in fp16", low=0)
    gptq_calibration_documents: bool = _field(True, "calibrate on packed documents; off: rows cut anywhere, as public")
    lqer_enabled: bool = _field(True, "low-rank correction of the worst quantised tensors")
    lqer_rank: int = _field(4, "rank of the low-rank correction", low=1, high=8)
    lqer_top_k: int = _field(3, "tensors that get a low-rank correction", low=0)
    lqer_weighted: bool = _field(
        True, "choose low-rank corrections by the outputs' error; off: by the weights' error, as public"
    )
    lqer_factor_bits: int = _field(4, "bits of symmetric low-rank factors", low=2, high=8)
    lqer_asym_enabled: bool = _field(
        True, "low-rank factors in int2 and int4 with group scales; off: symmetric, with a scale a row"
    )
    lqer_asym_group: int = _field(64, "group size of the second low-rank factor's scales", low=1)
    awq_groups: int = _field(
        0,
        "most salient groups of 64 columns, over all matrices, that get 8-bit codes with quantizer=gptq (#1908)",
        low=0,
    )
    compressor: str = _field("brotli", "entropy coder of the artifact with quantizer=gptq", choices=("brotli", "lzma"))
    control_tensor_name_patterns: str = _field(
        CONTROL_TENSORS, "comma-separated parts of names: tensors kept in fp16 whatever their size"
    )

    # Test-time training
    ttt_enabled: bool = _field(True, "score with test-time training")
    ttt_lora_rank: int = _field(128, "rank of the adapters", low=1)
    ttt_lora_alpha: float = _field(144.0, "adapters are scaled by alpha / rank", low=0.0)
    ttt_warm_start_a: bool = _field(True, "keep the adapters' A from one batch of documents to the next")
    ttt_lora_lr: float = _field(1e-4, "learning rate of the adapters", low=0.0)
    ttt_chunk_size: int = _field(48, "tokens scored between two updates", low=1)
    ttt_chunks_by_length: str = _field(
        "", "chunks of shorter documents, like 256:8,2000:24 (below 256 tokens 8, below 2000 tokens 24); empty: none"
    )
    ttt_eval_seq_len: int = _field(2048, "longest context of a scored chunk", low=2)
    ttt_kv_cache: bool = _field(
        False, "keep keys and values of earlier chunks as they were when scored; off: compute every window anew"
    )
    ttt_batch_size: int = _field(64, "documents adapted side by side", low=1)
    ttt_order: str = _field(
        "length",
        "length: the longest documents first, as public; stream: in the stream's order, slower",
        choices=("length", "stream"),
    )
    ttt_lanes: int = _field(8, "chains of batches along which A stays warm; the processes share them", low=1)
    ttt_micro_batch_tokens: int = _field(
        131_072, "window tokens of one forward and backward pass; fewer take less memory", low=1
    )
    ttt_grad_steps: int = _field(1, "updates on each scored chunk", low=1)
    ttt_weight_decay: float = _field(1.0, "weight decay of the adapters", low=0.0)
    ttt_beta1: float = _field(0.0, "decay of AdamW's first moment for the adapters", low=0.0, high=1.0)
    ttt_beta2: float = _field(0.999, "decay of AdamW's second moment for the adapters", low=0.0, high=1.0)
    ttt_q_lora: bool = _field(True, "adapt the queries")
    ttt_k_lora: bool = _field(True, "adapt the keys")
    ttt_v_lora: bool = _field(True, "adapt the values")
    ttt_mlp_lora: bool = _field(True, "adapt the MLP")
    ttt_o_lora: bool = _field(True, "adapt the attention output")
    ttt_optimizer: str = _field("adam", "optimizer of the adapters", choices=("adam", "sgd"))
    ttt_conf_weighted: bool = _field(
        False, "adapters learn from a chunk's target in proportion to its loss over the chunk's mean (ConfTTT)"
    )
    ttt_conf_alpha: float = _field(
        1.0, "share of ConfTTT's weights that follows the loss; the rest is the same for all targets", low=0.0, high=1.0
    )
    ttt_conf_clip: float = _field(3.0, "highest ratio of loss to mean in ConfTTT; the lowest is the inverse", low=1.0)
    ttt_eval_batches: str = _field("", "comma-separated batch numbers to score, 0 the shortest documents; empty: all")
    ngram_tilt_boost: float = _field(
        0.0,
        "added to the logit of the token that followed the same context before (2.625 in #2135); 0: no tilt",
        low=0.0,
        high=30.0,
    )
    ngram_tilt_order: int = _field(16, "tokens of the tilt's n-gram, the hinted one included", low=2)
    ngram_tilt_threshold: float = _field(
        0.8, "least share of a context's occurrences that the hinted token followed", low=0.0, high=1.0
    )
    ngram_tilt_scope: str = _field(
        "document",
        "text whose n-grams are counted: the target's document, or the stream before it, document by document",
        choices=("document", "stream"),
    )
    phased_ttt_enabled: bool = _field(True, "also train the base weights on scored documents, in phases")
    phased_ttt_prefix_docs: int = _field(2000, "scored documents trained on by the last phase", low=0)
    phased_ttt_num_phases: int = _field(3, "pauses in scoring that train the base weights", low=1)
    phased_ttt_documents: str = _field(
        "shortest",
        "which scored documents a phase takes when more are scored than it needs; shortest is the public set",
        choices=("shortest", "longest", "stream"),
    )
    phased_ttt_drop_next_bos: bool = _field(True, "leave out the next document's BOS when documents are joined")
    global_ttt_lr: float = _field(1e-3, "learning rate of the base weights' training, cosine to 0", low=0.0)
    global_ttt_momentum: float = _field(0.9, "momentum of the base weights' training", low=0.0, high=1.0)
    global_ttt_epochs: int = _field(1, "passes over each chunk in the base weights' training", low=0)
    global_ttt_chunk_tokens: int = _field(32_768, "tokens of a chunk in the base weights' training", low=2)
    global_ttt_batch_seqs: int = _field(32, "most sequences of a rank in one step of the base weights' training", low=1)
    global_ttt_warmup_start_lr: float = _field(
        0.0, "learning rate at the start of the warm-up of the base weights' training", low=0.0
    )
    global_ttt_warmup_chunks: int = _field(0, "chunks of the warm-up of the base weights' training", low=0)
    global_ttt_grad_clip: float = _field(1.0, "gradient clip of the base weights' training; 0: off", low=0.0)
    global_ttt_respect_doc_boundaries: bool = _field(
        True, "attention stops at document boundaries in the base weights' training"
    )

    from_env = _FromEnv()

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = _coerce(spec, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
            _check_range(spec, value)
        self._check_consistency()

    def _check_consistency(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ConfigError(message)

        need(
            self.model_dim % self.num_heads == 0,
            f"model_dim {self.model_dim} must be a multiple of num_heads {self.num_heads}",
        )
        need(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}",
        )
        need(
            self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim,
            f"rope_dims {self.rope_dims} must be even and at most the head dimension {self.head_dim}",
        )
        need(self.trellis_rows % 16 == 0, f"trellis_rows {self.trellis_rows} must be a multiple of 16")
        need(
            not self.key_offset or self.rope_dims < self.head_dim,
            f"key_offset moves the dimensions that do not rotate, and rope_dims {self.rope_dims} leaves none",
        )
        need(
            self.loop_start <= self.loop_end < self.num_layers or self.num_loops == 0,
            f"loop_start {self.loop_start} <= loop_end {self.loop_end} < num_layers {self.num_layers} must hold",
        )
        need(
            max(self.smear_gate_width, self.gate_attn_width) <= self.model_dim,
            f"smear_gate_width {self.smear_gate_width} and gate_attn_width {self.gate_attn_width} "
            f"must not exceed model_dim {self.model_dim}",
        )
        need(
            not self.mlp_gate or self.mlp_gate_width < self.model_dim,
            f"mlp_gate_width {self.mlp_gate_width} must be less than model_dim {self.model_dim}",
        )
        need(self.mlp_dim >= 1, f"mlp_mult {self.mlp_mult} leaves the MLP no hidden dimension")
        need(
            self.eval_stride <= self.eval_seq_len or not self.sliding_window_enabled,
            f"eval_stride {self.eval_stride} exceeds eval_seq_len {self.eval_seq_len}: tokens would be left out",
        )
        need(
            self.train_batch_tokens % self.micro_batch_tokens == 0,
            f"train_batch_tokens {self.train_batch_tokens} must be a multiple of "
            f"micro_batch_tokens {self.micro_batch_tokens}",
        )
        need(
            self.max_wallclock_seconds == 0 or self.max_wallclock_seconds > self.gptq_reserve_seconds,
            f"gptq_reserve_seconds {self.gptq_reserve_seconds} leaves nothing of "
            f"max_wallclock_seconds {self.max_wallclock_seconds}",
        )
        need(
            self.logit_softcap_negative == 0 or self.logit_softcap_negative >= 1e-6,
            f"logit_softcap_negative {self.logit_softcap_negative} must be 0 or at least 1e-06",
        )
        alone = self.ttt_order == "stream" and self.ttt_batch_size == self.ttt_lanes == 1
        need(
            self.ngram_tilt_scope == "document" or alone or not self.ngram_tilt_boost,
            "ngram_tilt_scope=stream counts documents that are scored later, or at the same time, unless "
            "ttt_order=stream, ttt_batch_size=1 and ttt_lanes=1; set these or ngram_tilt_scope=document",
        )
        longest = max([self.ttt_chunk_size, *(size for _, size in self.chunks_by_length())])
        need(
            not self.ttt_enabled or longest <= self.ttt_eval_seq_len,
            f"ttt_chunk_size {longest} is longer than ttt_eval_seq_len {self.ttt_eval_seq_len}: "
            "a chunk must fit into its own context",
        )
        need(
            not (self.ttt_enabled and self.phased_ttt_enabled) or self.global_ttt_chunk_tokens >= self.eval_seq_len,
            f"global_ttt_chunk_tokens {self.global_ttt_chunk_tokens} must hold a sequence of eval_seq_len "
            f"{self.eval_seq_len} tokens, or nothing would be trained on",
        )
        self.mixing_by_layer()
        self.segments_by_fraction()

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def softcap(self) -> float | tuple[float, float]:
        """Return the softcap of logits, or that of positive and that of negative ones where they differ."""
        positive, negative = self.logit_softcap, self.logit_softcap_negative
        return (positive, negative) if negative not in (0, positive) else positive

    def chunks_by_length(self) -> list[tuple[int, int]]:
        """Read ttt_chunks_by_length as (length, chunk) pairs, in ascending order.

        The chunk of a document is that of the first pair whose length exceeds the document's; without such a pair it is
        ttt_chunk_size. Raises ConfigError if the setting is not a list of such pairs.
        """
        text = self.ttt_chunks_by_length.strip()
        parts = [part.split(":") for part in text.split(",")] if text else []
        try:
            pairs = [(int(length), int(chunk)) for length, chunk in parts]
        except ValueError:  # not two, or not numbers
            pairs = [(0, 0)]
        if any(min(pair) < 1 for pair in pairs) or pairs != sorted(pairs):
            raise ConfigError(
                "ttt_chunks_by_length must be lengths and chunks in ascending order, like 256:8,2000:24, and "
                f"{self.ttt_chunks_by_length!r} is not"
            )
        return pairs

    def mixing_by_layer(self) -> dict[int, list[float]]:
        """Read loop_mixing as [β, α of each looped layer] by looped layer; without the setting there is none.

        Raises ConfigError if the setting does not fit the loop, or the loop is not of serial layers.
        """
        if not self.loop_mixing.strip():
            return {}
        layers = range(self.loop_start, self.loop_end + 1)
        try:
            rows = [[float(number) for number in row.split(":")] for row in self.loop_mixing.split(",")]
        except ValueError:  # not numbers
            rows = []
        fit = [len(row) for row in rows] == [1 + len(layers)] * len(layers)
        if not fit or not all(all(map(math.isfinite, row)) for row in rows):
            raise ConfigError(
                f"loop_mixing must be β:α:α… with {len(layers)} α for each of {len(layers)} looped layers, "
                f"like 1.5:0.2:0,1.9:0.1:0 for 2, and {self.loop_mixing!r} is not"
            )
        if not self.num_loops or self.loop_end >= self.parallel_start_layer:
            raise ConfigError("loop_mixing needs num_loops > 0 and loop_end < parallel_start_layer")
        return dict(zip(layers, rows, strict=True))

    def segments_by_fraction(self) -> list[tuple[int, float]]:
        """Read train_seq_schedule as (longest segment, end of its use as a fraction of training) pairs, in their order.

        Raises ConfigError if the setting is not a list of such pairs that ends with train_seq_len at 1.
        """
        text = self.train_seq_schedule.strip() or f"{self.train_seq_len}@1"
        try:
            pairs = [(int(length), float(end)) for length, end in (part.split("@") for part in text.split(","))]
        except ValueError:  # not two, or not numbers
            pairs = []
        ends = [0.0, *(end for _, end in pairs)]
        short = min((length for length, _ in pairs), default=0) < 2
        if short or ends != sorted(set(ends)) or pairs[-1] != (self.train_seq_len, 1):
            raise ConfigError(
                "train_seq_schedule must be lengths and ascending fractions that end with train_seq_len at 1, like "
                f"1024@0.1,{self.train_seq_len}@1, and {self.train_seq_schedule!r} is not"
            )
        return pairs

    @property
    def mlp_dim(self) -> int:
        """Return the hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    def gradient_accumulation(self, world_size: int) -> int:
        """Return the micro-batches of one rank in one optimizer step.

        Raises ConfigError if the micro-batches of a step cannot be dealt evenly to ``world_size`` ranks.
        """
        micro_batches = self.train_batch_tokens // self.micro_batch_tokens
        if micro_batches % world_size:
            raise ConfigError(
                f"{micro_batches} micro-batches a step (train_batch_tokens {self.train_batch_tokens} / "
                f"micro_batch_tokens {self.micro_batch_tokens}) cannot be dealt evenly to {world_size} processes: "
                f"choose micro_batch_tokens so that their number is a multiple of {world_size}"
            )
        return micro_batches // world_size

    @classmethod
    def preset(cls, name: str) -> RunConfig:
        """Return the configuration of a preset. Raises ConfigError for a name that is not in PRESETS."""
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; presets: {', '.join(PRESETS)}")
        return cls(**PRESETS[name], preset_name=name)

    def replace(self, **fields: Any) -> RunConfig:
        """Return a copy with ``fields`` changed; a string is converted to the field's type.

        Raises ConfigError for a name that is no setting and for a value that is not allowed.
        """
        resolved: dict[str, Any] = {}
        for name, value in fields.items():
            target = ALIASES.get(name, name)
            if target not in FIELDS:
                raise ConfigError(f"there is no setting {name!r}; {nearest_field(name)}")
            if target in resolved and resolved[target] != value:
                raise ConfigError(f"{name} is another name of {target}, and they are set to different values")
            resolved[target] = value
        return dataclasses.replace(self, **resolved)

    def reads(self, name: str) -> bool:
        """Return whether the chosen quantizer reads this setting; all other settings are read."""
        return all(name not in names for quantizer, names in READ_BY_QUANTIZER.items() if quantizer != self.quantizer)

    def to_json(self) -> str:
        """Return the configuration as JSON, with the fields in order of definition."""
        return json.dumps(dataclasses.asdict(self), indent=1)


FIELDS = {spec.name: spec for spec in dataclasses.fields(RunConfig)}

PRESETS: dict[str, dict[str, Any]] = {
    "record": {},
    "public_1874": dict(
        smear_gate_bos_mask=False,
        eval_public_truncation=True,
        quantizer="gptq",
        gptq_calibration_documents=False,
        lqer_weighted=False,
        embed_fp32_master=False,
        phased_ttt_drop_next_bos=False,
    ),
    "frontier": dict(  # docs/notes.md has the source of each
        case_coding=True,
        mlp_gate=True,
        beta2=0.99,
        warmdown_frac=0.85,
        wd_taper_final_mult=0.5,
        swa_blend=0.5,
        ttt_chunks_by_length="256:8,2000:24",
        ttt_eval_seq_len=2560,
        ngram_tilt_boost=2.625,
        ttt_lora_rank=80,
        ttt_beta2=0.99,
        ttt_weight_decay=0.5,
    ),
    "demo": dict(
        data_dir="./data/demo/",
        data_source="embedded",
        vocab_size=1024,
        model_dim=96,
        num_heads=4,
        num_kv_heads=2,
        rope_dims=8,
        train_batch_tokens=2048,
        micro_batch_tokens=2048,
        train_seq_len=256,
        eval_seq_len=256,
        val_batch_tokens=32_768,
        max_wallclock_seconds=100.0,
        gptq_reserve_seconds=1.0,
        muon_momentum_warmup_steps=100,
        ema_decay=0.97,
        warmup_steps=0,
        train_log_every=25,
        val_loss_every=0,
        gptq_passthrough_numel=4096,
        weight_bytes=520_000,
        trellis_states=8,
        trellis_rows=64,
        sensitivity_sequences=64,
        sensitivity_tokens=128,
        gptq_calibration_batches=16,
        gptq_calibration_tokens=2048,
        ttt_lora_rank=16,
        ttt_lora_alpha=18.0,
        ttt_lora_lr=1e-3,
        ttt_chunk_size=64,
        ttt_eval_seq_len=256,
        ttt_batch_size=16,
        phased_ttt_prefix_docs=16,
        phased_ttt_num_phases=1,
        global_ttt_chunk_tokens=2048,
    ),
}


def nearest_field(name: str) -> str:
    """Return a phrase that names the settings closest to ``name``."""
    close = difflib.get_close_matches(name.lower(), [*FIELDS, *ALIASES], n=3, cutoff=0.5)
    if not close:
        return "`pgolf config` lists them all"
    return "nearest: " + ", ".join(close)


def _coerce(spec: dataclasses.Field, value: Any) -> Any:
    """Convert ``value`` to the field's type; text may be what a person would write, such as ``on`` or ``1_000``."""
    kind = str(spec.type)
    shown = f"{spec.name} must be {kind}, and {value!r} is none"
    if kind == "str":
        if not isinstance(value, str):
            raise ConfigError(shown)
        return value
    if kind == "bool":
        words = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        found = words.get(str(value).strip().lower())
        if found is None:
            raise ConfigError(shown + " (write 0 or 1)")
        return found
    if isinstance(value, bool):
        raise ConfigError(shown)
    text = str(value).strip().replace("_", "")
    try:  # int() first: float() would round a large whole number
        number = int(text) if kind == "int" and text.isdecimal() else float(text)
    except ValueError:
        raise ConfigError(shown) from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ConfigError(shown)
    if kind == "int":
        if number != int(number):
            raise ConfigError(shown)
        return int(number)
    return number


def _check_range(spec: dataclasses.Field, value: Any) -> None:
    choices, low, high = (spec.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise ConfigError(f"{spec.name} must be one of {', '.join(map(str, choices))}, and {value!r} is none of them")
    if low is not None and value < low:
        raise ConfigError(f"{spec.name} must be at least {low:g}, and {value!r} is less")
    if high is not None and value > high:
        raise ConfigError(f"{spec.name} must be at most {high:g}, and {value!r} is more")


# Only settings begin like this: an environment variable that does and names no field is a mistake.
_FAMILIES = (
    "TTT_",
    "GLOBAL_TTT",
    "PHASED_TTT",
    "AWQ_",
    "LQER",
    "GPTQ",
    "MUON_",
    "POLAR_EXPRESS",
    "SMEAR_GATE",
    "GATE_ATTN",
    "QK_GAIN",
    "XSA_",
    "ROPE_",
    "WARMDOWN",
    "PARALLEL_START",
    "PARALLEL_FINAL",
    "EMA_DECAY",
    "TIED_EMBED",
    "ENABLE_LOOPING",
    "NUM_LOOPS",
    "MATRIX_LR",
    "MATRIX_BITS",
    "MATRIX_CLIP",
    "SCALAR_LR",
    "EMBED_LR",
    "EMBED_BITS",
    "EMBED_CLIP",
    "VAL_LOSS",
    "VAL_BATCH",
    "VAL_DOC",
    "MAX_WALLCLOCK",
    "TRAIN_BATCH",
    "TRAIN_SEQ",
    "TRAIN_LOG",
    "EVAL_SEQ",
    "EVAL_STRIDE",
    "LOGIT_SOFTCAP",
)


def _apply_environment(config: RunConfig, environ: Mapping[str, str]) -> RunConfig:
    fields: dict[str, str] = {}
    known = [name.upper() for name in (*FIELDS, *ALIASES) if name not in NOT_FROM_ENVIRONMENT]
    for variable, value in sorted(environ.items()):
        if variable in known:
            fields[variable.lower()] = value
        elif variable == variable.upper() and (
            variable.startswith(_FAMILIES)
            or (len(variable) >= 8 and difflib.get_close_matches(variable, known, n=1, cutoff=0.92))
        ):
            raise ConfigError(
                f"the environment variable {variable} looks like a setting but is none; "
                f"{nearest_field(variable)}. Correct it, or unset {variable}"
            )
    return config.replace(**fields)
