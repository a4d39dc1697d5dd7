"""The model card: what a run's record says of its model, for the people who will use it."""

import html
import json

from euroflax.experiment import Experiment
from euroflax.languages import LANGUAGES
from euroflax.model import num_parameters

_LISTED = 12


def model_card(declared: Experiment, manifest: dict, metrics: list[dict], facts: dict) -> str:
    """The README.md of an exported model, Markdown with the front matter that model hubs read.

    Args:
        declared: the experiment, as the checkpoint has it.
        manifest: that of the run.
        metrics: its metrics.
        facts: the `step` and `position` of the checkpoint.
    """
    model, step = declared.model, facts["step"]
    tokens = declared.tokens_at(facts["position"])
    heads = f"{model.num_heads} heads over {model.num_kv_heads} key heads of width {model.head_dim}"
    sections = [
        _front_matter(declared),
        f"# {declared.name}",
        f"A base model of {num_parameters(model):,} parameters in {len(declared.language_codes)} languages, trained "
        f"with Euroflax on {tokens:,} tokens. It continues text; it has not been taught to follow instructions or to "
        "decline anything.",
        "## Languages",
        ", ".join(f"{_name(code)} ({code})" for code in declared.language_codes),
        "## Model",
        f"{model.num_layers} layers of width {model.embed_dim}, {heads}, feed-forward width {model.mlp_dim}, "
        f"{model.vocab_size:,} tokens in the vocabulary, a context of {declared.context_length:,} tokens; "
        f"RMSNorm, rotary positions (base {model.rope_theta:g}), SwiGLU"
        f"{', QK-norm' if model.qk_norm else ''}{', tied embedding' if model.tied_output else ''}.",
        "## Data",
        _sources(manifest, facts["ledger"]["entries"]),
        "## Evaluation",
        _evaluation(metrics, step),
        "## Training",
        _training(declared, manifest, step, facts["position"]),
        "## Licence",
        "The record of the run states the licences of its sources, above, and none for the weights: whoever publishes "
        "them states it here.",
    ]
    return "\n\n".join(sections) + "\n"


def _name(code: str) -> str:
    return LANGUAGES[code].name if code in LANGUAGES else code


def _front_matter(declared: Experiment) -> str:
    """YAML, in the part of it that is JSON too."""
    languages = "\n".join(f"- {json.dumps(code)}" for code in declared.language_codes)
    base = f"\nbase_model: {json.dumps(declared.continue_from)}" if declared.continue_from else ""
    return f"---\nlanguage:\n{languages}\nlibrary_name: transformers\npipeline_tag: text-generation{base}\n---"


def _table(header: list[str], rows: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, row))} |" for row in cells)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one cell of a table."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def _sources(manifest: dict, ledger: list[dict]) -> str:
    rows = []
    for source in manifest["sources"]:
        mine = [entry for entry in ledger if entry["source"] == source["name"]] if source["split"] == "train" else []
        rows.append(
            [
                source["name"],
                _name(source["language"]),
                _by_document(source, "licence"),
                _by_document(source, "provider"),
                source["origin"] + (f" by {source['generator']}" if source["generator"] else ""),
                source["opt_out"],
                f"{source['documents']:,}",
                f"{source['bytes']:,}",
                f"{sum(entry['tokens'] for entry in mine):,}" if mine else "held out",
                f"{mine[0]['epochs']:.2f}" if mine else "",
            ]
        )
    header = ["source", "language", "licence", "provider", "origin", "opt-outs"]
    table = _table([*header, "documents", "bytes", "tokens read", "epochs"], rows)
    left_out = [
        f"the documents of {count:,} listed ids of {name} from row {entry['position']:,} on"
        for entry in manifest.get("withdrawn", [])
        for name, count in entry["listed"].items()
        if count
    ]
    return table + (f"\n\nLeft out, being withdrawn: {'; '.join(left_out)}." if left_out else "")


def _by_document(source: dict, field: str) -> str:
    """What a source declares, and what its documents say one by one where they do."""
    counts = source.get(f"{field}s", {})
    listed = [f"{value} ({count:,})" for value, count in list(counts.items())[:_LISTED]]
    more = [f"{len(counts) - _LISTED} more"] if len(counts) > _LISTED else []
    return source[field] + (f": {', '.join([*listed, *more])}" if counts else "")


def _evaluation(metrics: list[dict], step: int) -> str:
    found = [line for line in metrics if "eval" in line and line["step"] <= step]
    if not found:
        return "Not measured."
    last = found[-1]
    rows = [
        [_name(key.removeprefix("bits_per_byte.")), f"{value:.4f}" if value is not None else "not finite"]
        for key, value in last["eval"].items()
    ]
    return f"Bits per byte of held-out text after step {last['step']}.\n\n" + _table(
        ["language", "bits per byte"], rows
    )


def _batch_tokens(declared: Experiment, position: int) -> int:
    span = declared.span_at(max(position - 1, 0))
    return span.batch_rows * span.sequence_length


def _training(declared: Experiment, manifest: dict, step: int, position: int) -> str:
    schedule = declared.training.schedule
    sessions = [session for session in manifest["sessions"] if session["steps"]]
    flops = sum(session["flops"] for session in sessions)
    hours = sum(sum(s.get("seconds", {}).values()) * s["devices"] for s in sessions) / 3600
    hardware = sorted({f"{session['devices']} x {session['device_kind']}" for session in sessions})
    energy = [session["energy_joules"] for session in sessions]
    boundaries = sorted({session["energy_boundary"] for session in sessions if session["energy_boundary"]})
    joules = "not measured" if None in energy else f"{sum(energy):,.0f} J, {'; '.join(boundaries)}"
    lines = [
        f"- {step:,} steps, the last of {_batch_tokens(declared, position):,} tokens; {schedule.kind} schedule, "
        f"peak rate {schedule.peak_learning_rate:g}, AdamW ({declared.training.adam_beta1:g}, "
        f"{declared.training.adam_beta2:g}), decay {declared.training.weight_decay:g}, "
        f"compute in {declared.model.compute_dtype}",
        f"- Began with {f'the weights of {declared.continue_from}' if declared.continue_from else 'random weights'}, "
        f"seed {declared.training.seed}",
        f"- {', '.join(hardware)}; {hours:.2f} device-hours in {len(sessions)} sessions; "
        f"{flops:.3g} FLOPs by arithmetic over the model; energy {joules}",
        f"- {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}",
    ]
    return "\n".join(lines)
