"""A model of 9 million parameters on 160 MB of text in 24 languages, in an hour on two CPU cores.

    python -m euroflax.run experiments/small_eu24.py --data-root ../shared/data

The data root holds `eu24/LL.jsonl.zst` for each language LL: a document a line, with its text, where it is from
(`source`) and its licence (`license`). One document in twenty is held out, by the hash of where it is from. The shares
follow the square root of the size of each language, so that the small ones are read more often than the large ones.
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

MEGABYTES = {
    "bg": 5.5, "cs": 9.2, "da": 8.4, "de": 11.4, "el": 11.4, "en": 11.4, "es": 11.4, "et": 3.7, "fi": 4.2, "fr": 11.4,
    "ga": 1.1, "hr": 1.5, "hu": 6.7, "it": 11.4, "lt": 2.6, "lv": 1.2, "mt": 0.15, "nl": 9.3, "pl": 10.1, "pt": 7.4,
    "ro": 2.6, "sk": 5.6, "sl": 4.7, "sv": 7.2,
}  # fmt: skip

TOKENS_PER_BATCH = 8192
STEPS = 512

roots = {code: size**0.5 for code, size in MEGABYTES.items()}


def documentation(code: str) -> Source:
    """Texts of free software in one language: manuals, interfaces, stories."""
    return Source(
        name=f"software-{code}",
        language=code,
        path=f"eu24/{code}.jsonl.zst",
        licence="free software licences, by document",
        provider="free software projects, by document",
        origin="public",
        opt_out="not applicable",
        id_field="source",
        licence_field="license",
        holdout_fraction=0.05,
        expected_bytes=int(MEGABYTES[code] * 1e6),
    )


experiment = Experiment(
    model=Model(
        num_layers=6,
        embed_dim=256,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=768,
        vocab_size=16_384,
        qk_norm=True,
        tied_output=True,
        compute_dtype="float32",
    ),
    data=Data(
        sources=tuple(documentation(code) for code in sorted(MEGABYTES)),
        mixture=Mixture(weights={f"software-{code}": root / sum(roots.values()) for code, root in roots.items()}),
        tokenizer=Tokenizer(sample_bytes=48_000_000),
        sequence_length=512,
    ),
    training=Training(
        tokens=STEPS * TOKENS_PER_BATCH,
        batch_tokens=TOKENS_PER_BATCH,
        schedule=Schedule(
            peak_learning_rate=3e-3,
            warmup_tokens=32 * TOKENS_PER_BATCH,
            decay_tokens=128 * TOKENS_PER_BATCH,
        ),
        z_loss=1e-4,
    ),
    checkpoint=Checkpoint(every_steps=64),
    evaluation=Evaluation(every_steps=128, max_documents=20),
)
