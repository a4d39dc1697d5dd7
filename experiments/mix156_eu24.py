"""A mixture of 156 sources with the weights of a real 9B model's list, to measure the loader with.

    python -m euroflax.run experiments/mix156_eu24.py bench --data-root DATA

Of the list only names and weights are here, and the weights are taken as shares of tokens. Each source reads
DATA/eu24/LL.jsonl.zst, LL being the language at the end of its name, or English where that is none of the 24.
"""

from euroflax.experiment import Data, Experiment, Mixture, Model, Schedule, Source, Tokenizer, Training
from euroflax.languages import EU24, fold

WEIGHTS = """
0.324000 dclm-1.0
0.004000 finemath-0.0.0-finemath-4plus
0.000611 finepdfs-1.0.0-als_Latn
0.000370 finepdfs-1.0.0-bos_Latn
0.000491 finepdfs-1.0.0-bul_Cyrl
0.000436 finepdfs-1.0.0-cat_Latn
0.000284 finepdfs-1.0.0-ces_Latn
0.000317 finepdfs-1.0.0-dan_Latn
0.000015 finepdfs-1.0.0-deu_Latn
0.000420 finepdfs-1.0.0-ekk_Latn
0.000770 finepdfs-1.0.0-ell_Grek
0.106376 finepdfs-1.0.0-eng_Latn
0.000347 finepdfs-1.0.0-eus_Latn
0.000370 finepdfs-1.0.0-fin_Latn
0.000484 finepdfs-1.0.0-fra_Latn
0.000362 finepdfs-1.0.0-gle_Latn
0.000371 finepdfs-1.0.0-glg_Latn
0.000358 finepdfs-1.0.0-hrv_Latn
0.000280 finepdfs-1.0.0-hun_Latn
0.000332 finepdfs-1.0.0-isl_Latn
0.000596 finepdfs-1.0.0-ita_Latn
0.003607 finepdfs-1.0.0-kat_Geor
0.000391 finepdfs-1.0.0-lit_Latn
0.000592 finepdfs-1.0.0-lvs_Latn
0.000422 finepdfs-1.0.0-mkd_Cyrl
0.000467 finepdfs-1.0.0-mlt_Latn
0.000460 finepdfs-1.0.0-nld_Latn
0.000315 finepdfs-1.0.0-nno_Latn
0.000308 finepdfs-1.0.0-nob_Latn
0.000290 finepdfs-1.0.0-pol_Latn
0.000528 finepdfs-1.0.0-por_Latn
0.000337 finepdfs-1.0.0-ron_Latn
0.000340 finepdfs-1.0.0-slk_Latn
0.000414 finepdfs-1.0.0-slv_Latn
0.000415 finepdfs-1.0.0-spa_Latn
0.000341 finepdfs-1.0.0-srp_Cyrl
0.000331 finepdfs-1.0.0-swe_Latn
0.000639 finepdfs-1.0.0-tur_Latn
0.000237 finepdfs-1.0.0-ukr_Cyrl
0.000047 finepdfs-edu-1.0.0-als_Latn
0.000098 finepdfs-edu-1.0.0-bos_Latn
0.000125 finepdfs-edu-1.0.0-bul_Cyrl
0.000115 finepdfs-edu-1.0.0-cat_Latn
0.000408 finepdfs-edu-1.0.0-ces_Latn
0.000169 finepdfs-edu-1.0.0-dan_Latn
0.001681 finepdfs-edu-1.0.0-deu_Latn
0.000041 finepdfs-edu-1.0.0-ekk_Latn
0.000234 finepdfs-edu-1.0.0-ell_Grek
0.014184 finepdfs-edu-1.0.0-eng_Latn
0.000030 finepdfs-edu-1.0.0-eus_Latn
0.000196 finepdfs-edu-1.0.0-fin_Latn
0.001754 finepdfs-edu-1.0.0-fra_Latn
0.000024 finepdfs-edu-1.0.0-glg_Latn
0.000163 finepdfs-edu-1.0.0-hrv_Latn
0.000487 finepdfs-edu-1.0.0-hun_Latn
0.000025 finepdfs-edu-1.0.0-isl_Latn
0.001021 finepdfs-edu-1.0.0-ita_Latn
0.000087 finepdfs-edu-1.0.0-kat_Geor
0.000088 finepdfs-edu-1.0.0-lit_Latn
0.000056 finepdfs-edu-1.0.0-lvs_Latn
0.000027 finepdfs-edu-1.0.0-mkd_Cyrl
0.000010 finepdfs-edu-1.0.0-mlt_Latn
0.000490 finepdfs-edu-1.0.0-nld_Latn
0.000004 finepdfs-edu-1.0.0-nno_Latn
0.000130 finepdfs-edu-1.0.0-nob_Latn
0.000753 finepdfs-edu-1.0.0-pol_Latn
0.001284 finepdfs-edu-1.0.0-por_Latn
0.000444 finepdfs-edu-1.0.0-ron_Latn
0.000184 finepdfs-edu-1.0.0-slk_Latn
0.000062 finepdfs-edu-1.0.0-slv_Latn
0.002847 finepdfs-edu-1.0.0-spa_Latn
0.000192 finepdfs-edu-1.0.0-srp_Cyrl
0.000327 finepdfs-edu-1.0.0-swe_Latn
0.000245 finepdfs-edu-1.0.0-tur_Latn
0.000478 finepdfs-edu-1.0.0-ukr_Cyrl
0.002058 hplt-3.0-als_Latn
0.001462 hplt-3.0-bos_Latn
0.001925 hplt-3.0-bul_Cyrl
0.001725 hplt-3.0-cat_Latn
0.002164 hplt-3.0-ces_Latn
0.001519 hplt-3.0-dan_Latn
0.005300 hplt-3.0-deu_Latn
0.001441 hplt-3.0-ekk_Latn
0.003138 hplt-3.0-ell_Grek
0.001176 hplt-3.0-eus_Latn
0.001770 hplt-3.0-fin_Latn
0.006995 hplt-3.0-fra_Latn
0.001208 hplt-3.0-gle_Latn
0.001232 hplt-3.0-glg_Latn
0.001626 hplt-3.0-hrv_Latn
0.002395 hplt-3.0-hun_Latn
0.001116 hplt-3.0-isl_Latn
0.005054 hplt-3.0-ita_Latn
0.011542 hplt-3.0-kat_Geor
0.001497 hplt-3.0-lit_Latn
0.002026 hplt-3.0-lvs_Latn
0.001402 hplt-3.0-mkd_Cyrl
0.001491 hplt-3.0-mlt_Latn
0.002971 hplt-3.0-nld_Latn
0.000997 hplt-3.0-nno_Latn
0.001370 hplt-3.0-nob_Latn
0.003259 hplt-3.0-pol_Latn
0.005665 hplt-3.0-por_Latn
0.002441 hplt-3.0-ron_Latn
0.001637 hplt-3.0-slk_Latn
0.001486 hplt-3.0-slv_Latn
0.010192 hplt-3.0-spa_Latn
0.001667 hplt-3.0-srp_Cyrl
0.002057 hplt-3.0-swe_Latn
0.002763 hplt-3.0-tur_Latn
0.002234 hplt-3.0-ukr_Cyrl
0.002000 megamath-0.0.0-megamath-text-code-block
0.002000 megamath-0.0.0-megamath-web-pro
0.054000 nemotron-cc-1.0-high-actual
0.131440 nemotron-cc-1.0-medium-actual
0.054000 nemotron-cc-1.0-medium-high-actual
0.000994 nemotron-cc-opus-1.1-bos_Latn
0.001309 nemotron-cc-opus-1.1-bul_Cyrl
0.001173 nemotron-cc-opus-1.1-cat_Latn
0.001471 nemotron-cc-opus-1.1-ces_Latn
0.002133 nemotron-cc-opus-1.1-ell_Grek
0.000980 nemotron-cc-opus-1.1-est_Latn
0.000800 nemotron-cc-opus-1.1-eus_Latn
0.000846 nemotron-cc-opus-1.1-gle_Latn
0.000838 nemotron-cc-opus-1.1-glg_Latn
0.001106 nemotron-cc-opus-1.1-hrv_Latn
0.007849 nemotron-cc-opus-1.1-kat_Geor
0.001377 nemotron-cc-opus-1.1-lav_Latn
0.001018 nemotron-cc-opus-1.1-lit_Latn
0.000953 nemotron-cc-opus-1.1-mkd_Cyrl
0.001014 nemotron-cc-opus-1.1-mlt_Latn
0.001113 nemotron-cc-opus-1.1-slk_Latn
0.001010 nemotron-cc-opus-1.1-slv_Latn
0.001400 nemotron-cc-opus-1.1-sqi_Latn
0.001134 nemotron-cc-opus-1.1-srp_Cyrl
0.001879 nemotron-cc-opus-1.1-tur_Latn
0.003604 nemotron-cc-tower+-0.1-parallel-tower72b-deu_Latn
0.001204 nemotron-cc-tower+-0.1-parallel-tower72b-fin_Latn
0.003437 nemotron-cc-tower+-0.1-parallel-tower72b-ita_Latn
0.006930 nemotron-cc-tower+-0.1-parallel-tower72b-spa_Latn
0.001399 nemotron-cc-tower+-0.1-parallel-tower72b-swe_Latn
0.001033 nemotron-cc-tower+-0.1-parallel-tower9b-dan_Latn
0.004756 nemotron-cc-tower+-0.1-parallel-tower9b-fra_Latn
0.001629 nemotron-cc-tower+-0.1-parallel-tower9b-hun_Latn
0.000759 nemotron-cc-tower+-0.1-parallel-tower9b-isl_Latn
0.002020 nemotron-cc-tower+-0.1-parallel-tower9b-nld_Latn
0.000678 nemotron-cc-tower+-0.1-parallel-tower9b-nno_Latn
0.000932 nemotron-cc-tower+-0.1-parallel-tower9b-nob_Latn
0.002216 nemotron-cc-tower+-0.1-parallel-tower9b-pol_Latn
0.003852 nemotron-cc-tower+-0.1-parallel-tower9b-por_Latn
0.001660 nemotron-cc-tower+-0.1-parallel-tower9b-ron_Latn
0.001519 nemotron-cc-tower+-0.1-parallel-tower9b-ukr_Cyrl
0.009200 olmo-mix-1124-arxiv
0.025300 olmo-mix-1124-pes2o
0.001500 olmo-mix-1124-wiki
0.072000 starcoder-0.0.0
"""


def part(name: str) -> Source:
    """The text that stands for a part of the list."""
    code = fold(name.rpartition("-")[2].partition("_")[0])
    language = code if code in EU24 else "en"
    return Source(
        name=name,
        language=language,
        path=f"eu24/{language}.jsonl.zst",
        licence="unknown",
        provider="unknown",
        origin="unknown",
        opt_out="unknown",
    )


weights = {name: float(weight) for weight, name in map(str.split, WEIGHTS.strip().splitlines())}

experiment = Experiment(
    model=Model(
        num_layers=2,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=384,
        vocab_size=32_768,
    ),
    data=Data(
        sources=tuple(part(name) for name in weights),
        mixture=Mixture(weights=weights, unit="tokens"),
        tokenizer=Tokenizer(sample_bytes=100_000_000),
        sequence_length=4096,
    ),
    training=Training(
        tokens=15_000_000_000_000,
        batch_tokens=1024 * 4096,
        schedule=Schedule(peak_learning_rate=3e-4),
    ),
)
