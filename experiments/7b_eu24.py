"""A 7B model in the 24 official languages of the European Union, on 64 accelerators or a multiple of them.

    python -m euroflax.run experiments/7b_eu24.py plan
    python -m euroflax.run experiments/7b_eu24.py --data-root /data

The shape is that of the European models of this size (32 layers of 4,096 with 8 key heads, as Apertus-8B and
Salamandra-7B have it), the schedule that of OpenEuroLLM's Prelude (warm-up, stable, linear decay over the last fifth
to zero, AdamW .9/.95, decay .1, clip 1). A third of the text is English; the rest is shared over the other languages
by the square root of what HPLT 3.0 has of them, which lifts the small ones.
"""

from euroflax.experiment import (
    Checkpoint,
    Data,
    Evaluation,
    Experiment,
    Mesh,
    Mixture,
    Model,
    Schedule,
    Source,
    Tokenizer,
    Training,
)

# Billions of tokens in HPLT 3.0 by language; about four bytes of UTF-8 a token. English is taken as 2,000.
HPLT3_BILLION_TOKENS = {
    "bg": 43, "cs": 94, "da": 55, "de": 549, "el": 104, "en": 2000, "es": 692, "et": 18, "fi": 64, "fr": 626,
    "ga": 0.83, "hr": 30, "hu": 91, "it": 298, "lt": 23, "lv": 19, "mt": 0.75, "nl": 168, "pl": 222, "pt": 328,
    "ro": 98, "sk": 33, "sl": 18, "sv": 102,
}  # fmt: skip
ENGLISH_SHARE = 1 / 3

roots = {code: size**0.5 for code, size in HPLT3_BILLION_TOKENS.items() if code != "en"}
shares = {code: (1 - ENGLISH_SHARE) * root / sum(roots.values()) for code, root in roots.items()}
shares["en"] = ENGLISH_SHARE

TOKENS = 2_000_000_000_000
BATCH_TOKENS = 1024 * 4096


def hplt(code: str) -> Source:
    """The part of HPLT 3.0 in one language, one document in ten thousand held out."""
    return Source(
        name=f"hplt3-{code}",
        language=code,
        path=f"hplt3/{code}",
        licence="CC0-1.0 for the packaging; the texts keep their own terms",
        provider="HPLT",
        origin="crawled",
        opt_out="unknown",
        holdout_fraction=1e-4,
        expected_bytes=int(HPLT3_BILLION_TOKENS[code] * 4e9),
    )


experiment = Experiment(
    model=Model(
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=11008,
        vocab_size=131_072,
        rope_theta=500_000.0,
        qk_norm=True,
        remat="full",
    ),
    data=Data(
        sources=tuple(hplt(code) for code in sorted(shares)),
        mixture=Mixture(weights={f"hplt3-{code}": share for code, share in shares.items()}),
        tokenizer=Tokenizer(sample_bytes=20_000_000_000),
        sequence_length=4096,
    ),
    training=Training(
        tokens=TOKENS,
        batch_tokens=BATCH_TOKENS,
        schedule=Schedule(
            peak_learning_rate=3e-4,
            warmup_tokens=2000 * BATCH_TOKENS,
            decay_tokens=TOKENS // 5,
        ),
        z_loss=1e-5,
    ),
    mesh=Mesh(data=-1, fsdp=64),
    checkpoint=Checkpoint(every_steps=1000, keep_last=3, keep_every_steps=20_000),
    evaluation=Evaluation(every_steps=1000),
)
