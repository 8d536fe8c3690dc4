"""The presets of each model: defaults of all options, by name."""

from __future__ import annotations

from dataclasses import replace

from .config import DataOptions, ModelOptions, OptimizerOptions, RunOptions, TrainConfig

__all__ = ["BERT_PRESETS", "LSTM_PRESETS", "PRESETS", "T5_PRESETS", "TRANSFORMER_PRESETS"]

PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        data=DataOptions(vocab_size=512, seq_len=64),
        model=ModelOptions(n_layer=2, n_head=2, n_embd=32),
        optimizer=OptimizerOptions(steps=60, batch_size=4, lr=3e-3, min_lr=3e-4, warmup=6),
        run=RunOptions(eval_every=20, eval_batches=4, save_every=20, log_every=1, sample_tokens=40),
    ),
    "small": TrainConfig(),
    "gpt2": TrainConfig(
        preset="gpt2",
        data=DataOptions(vocab_size=50304, seq_len=1024),
        model=ModelOptions(n_layer=12, n_head=12, n_embd=768),
        optimizer=OptimizerOptions(
            steps=20_000, batch_size=16, grad_accum=32, lr=6e-4, min_lr=6e-5, warmup=700
        ),
        run=RunOptions(eval_every=250, eval_batches=40, save_every=1000),
    ),
    "llama": TrainConfig(
        preset="llama",
        model=ModelOptions(bias=False, norm="rms", position="rotary", mlp="swiglu", kv_heads=2, tie=False),
    ),
}


LSTM_PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        data=DataOptions(vocab_size=512, seq_len=32),
        model=ModelOptions(model="lstm", n_layer=2, n_head=1, n_embd=32),
        optimizer=OptimizerOptions(steps=60, batch_size=4, lr=1e-2, min_lr=1e-3, warmup=6),
        run=RunOptions(eval_every=20, eval_batches=4, save_every=20, log_every=1, sample_tokens=40),
    ),
    "small": TrainConfig(
        preset="small",
        data=DataOptions(seq_len=64),
        model=ModelOptions(model="lstm", n_layer=2, n_head=1, n_embd=512, dropout=0.2),
        optimizer=OptimizerOptions(steps=1000, batch_size=32, lr=2e-3, min_lr=2e-4, warmup=50),
    ),
}


BERT_PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        data=DataOptions(vocab_size=512, seq_len=64),
        model=ModelOptions(model="bert", n_layer=2, n_head=2, n_embd=32),
        optimizer=OptimizerOptions(steps=60, batch_size=8, lr=3e-3, min_lr=3e-4, warmup=6),
        run=RunOptions(eval_every=20, eval_batches=4, save_every=20, log_every=1),
    ),
    "mini": TrainConfig(
        preset="mini",
        data=DataOptions(vocab_size=8192, seq_len=128),
        model=ModelOptions(model="bert", n_layer=4, n_head=4, n_embd=256),
        optimizer=OptimizerOptions(steps=6000, batch_size=32, lr=1e-3, min_lr=1e-5, warmup=300, beta2=0.98),
        run=RunOptions(eval_every=1000, eval_batches=32, save_every=500),
    ),
    "small": TrainConfig(
        preset="small",
        data=DataOptions(vocab_size=16384, seq_len=128),
        model=ModelOptions(model="bert", n_layer=4, n_head=8, n_embd=512),
        optimizer=OptimizerOptions(steps=20_000, batch_size=32, lr=6e-4, min_lr=6e-6, warmup=1000, beta2=0.98),
        run=RunOptions(eval_every=1000, eval_batches=32, save_every=1000),
    ),
    "base": TrainConfig(
        preset="base",
        data=DataOptions(vocab_size=30522, seq_len=512),
        model=ModelOptions(model="bert", n_layer=12, n_head=12, n_embd=768, dropout=0.1),
        optimizer=OptimizerOptions(
            steps=100_000, batch_size=32, grad_accum=8, lr=1e-4, min_lr=0.0, warmup=10_000, beta2=0.999, weight_decay=0.01
        ),
        run=RunOptions(eval_every=1000, eval_batches=40, save_every=1000),
    ),
}


_TRANSFORMER = ModelOptions(model="transformer", position="sinusoidal", mlp="relu", label_smoothing=0.1)

TRANSFORMER_PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        data=DataOptions(vocab_size=512, seq_len=64),
        model=replace(_TRANSFORMER, n_layer=2, n_head=2, n_embd=32, n_inner=64),
        optimizer=OptimizerOptions(steps=60, batch_size=8, lr=5e-3, min_lr=5e-4, warmup=6, beta2=0.98, weight_decay=0.0),
        run=RunOptions(eval_every=20, eval_batches=4, save_every=20, log_every=1, sample_tokens=40),
    ),
    # the shape of Wu et al., "Good for Misconceived Reasons" (2021), Transformer-Tiny for Multi30k. Of 900 updates on it with
    # norms before the branches, at 3e-3, the validation loss is 2.46, with norms behind them, at 1.5e-3, 3.60.
    "small": TrainConfig(
        preset="small",
        data=DataOptions(vocab_size=10_000, seq_len=128),
        model=replace(_TRANSFORMER, n_layer=4, n_head=4, n_embd=128, n_inner=256, dropout=0.3, pre_norm=True),
        optimizer=OptimizerOptions(
            steps=3000, batch_size=32, lr=3e-3, min_lr=5e-5, warmup=600, beta2=0.98, weight_decay=0.0
        ),
        run=RunOptions(eval_every=300, eval_batches=0, save_every=300),
    ),
    # Vaswani et al. (2017): about 25,000 tokens a side in an update
    "base": TrainConfig(
        preset="base",
        data=DataOptions(vocab_size=37_000, seq_len=256),
        model=replace(_TRANSFORMER, n_layer=6, n_head=8, n_embd=512, n_inner=2048, dropout=0.1),
        optimizer=OptimizerOptions(
            steps=100_000, batch_size=16, grad_accum=6, lr=7e-4, min_lr=0.0, warmup=4000, beta2=0.98, weight_decay=0.0
        ),
        run=RunOptions(eval_every=1000, eval_batches=0, save_every=1000),
    ),
}


# T5 1.1, Shazeer, "GLU variants improve Transformer" (2020)
_T5 = ModelOptions(
    model="t5", position="relative", norm="rms", pre_norm=True, bias=False, mlp="geglu", tie=False, n_inner=None
)  # fmt: skip

T5_PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        data=DataOptions(vocab_size=512, seq_len=64),
        model=replace(_T5, n_layer=2, n_head=2, n_embd=32, n_inner=64),
        optimizer=OptimizerOptions(steps=60, batch_size=8, lr=5e-3, min_lr=5e-4, warmup=6, beta2=0.98, weight_decay=0.0),
        run=RunOptions(eval_every=20, eval_batches=4, save_every=20, log_every=1, sample_tokens=40),
    ),
    # After 400 updates the validation loss is 4.72 at this rate, 5.00 at 2e-3, 5.21 at 5e-3.
    "small": TrainConfig(
        preset="small",
        data=DataOptions(vocab_size=4096, seq_len=256),
        model=replace(_T5, n_layer=4, n_head=4, n_embd=256, n_inner=640),
        optimizer=OptimizerOptions(steps=1000, batch_size=16, lr=7e-4, min_lr=1e-4, warmup=100, beta2=0.98, weight_decay=0.0),
        run=RunOptions(eval_every=200, eval_batches=8, save_every=200),
    ),
}
