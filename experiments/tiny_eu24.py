"""The default run: a tiny model on the embedded text in 24 languages, in a minute or two on a CPU.

python -m euroflax.run experiments/tiny_eu24.py
"""

from euroflax.experiment import (
    Checkpoint,
    Data,
    Evaluation,
    Experiment,
    Mixture,
    Model,
    Schedule,
    Source,
    Tokenizer,
    Training,
)
from euroflax.languages import EU24


def sample(code: str, ending: str) -> Source:
    """The embedded text in one language."""
    return Source(
        name=f"sample-{code}",
        language=code,
        path=f"sample:{code}{ending}.jsonl",
        licence="CC0-1.0",
        provider="Euroflax",
        origin="public",
        opt_out="not applicable",
    )


experiment = Experiment(
    model=Model(
        num_layers=2,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=384,
        vocab_size=1024,
        qk_norm=True,
        tied_output=True,
        compute_dtype="float32",
    ),
    data=Data(
        sources=tuple(sample(code, "") for code in EU24),
        mixture=Mixture(weights={f"sample-{code}": 1 / 24 for code in EU24}),
        tokenizer=Tokenizer(sample_bytes=1_000_000),
        sequence_length=128,
    ),
    training=Training(
        tokens=327_680,
        batch_tokens=2048,
        schedule=Schedule(
            peak_learning_rate=2e-3,
            warmup_tokens=40_960,
            decay_tokens=163_840,
            decay="1-sqrt",
            final_fraction=0.1,
        ),
        z_loss=1e-4,
    ),
    checkpoint=Checkpoint(every_steps=40),
    evaluation=Evaluation(sources=tuple(sample(code, ".heldout") for code in EU24), every_steps=40),
)
