"""The comparison of models as lines, as one HTML page that needs nothing from anywhere, as bars.

    print(*measure_lines(results), sep="\\n")
    write_results(results, Path("runs/comparison"))
    draw_bars(results, "report.png")

`results` is what eval.py compare writes as results.json. What models and data sets wrote is text
here, never markup, and the page forbids itself (Content-Security-Policy) every request.
"""

import math
import warnings
from html import escape

from minisft.common.json_files import write_json

NAMES = {
    "bleu_2": "BLEU-2",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
}
# Counts of what did not go as it should, and how a person is told.
TROUBLES = {
    "answers_cut": "answers were cut at --max_new_tokens",
    "questions_without_room": "questions left no room for an answer, which counts as an empty one",
    "references_without_room": "references had no room and do not count in the perplexity",
}
# Those that come with the system or its browsers, for names of models in Chinese.
CHINESE_FONTS = {
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Heiti SC",
}
WORDS = {"win": "won", "tie": "tied", "loss": "lost", None: "unreadable"}

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --good: #17713a; --bad: #b02a2a; }
@media (prefers-color-scheme: dark) { :root { --good: #6fd193; --bad: #ff9a92; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 90rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0; }
h1, h2, p, .text { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
small { opacity: .7; }
form { position: sticky; z-index: 1; top: 0; background: Canvas; padding: .6rem 0; display: flex;
  flex-wrap: wrap; gap: .6rem; align-items: center; border-bottom: 1px solid var(--line); }
input, select { font: inherit; padding: .35rem .5rem; max-width: 100%; }
input { flex: 1 1 12rem; }
article { border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0; padding: .8rem; }
.text { white-space: pre-wrap; }
.answers { display: grid; gap: .8rem; margin-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.answers > section { background: var(--soft); border-radius: .4rem; padding: .6rem; }
.win { color: var(--good); opacity: 1; } .loss { color: var(--bad); opacity: 1; }
@media (max-width: 40rem) { td small { display: block; } th, td { padding: .3rem .4rem; } }
[hidden] { display: none; }
"""

SCRIPT = """
const form = document.querySelector("form");
const articles = [...document.querySelectorAll("article")];
function filter() {
  const words = form.search.value.toLowerCase(), kind = form.kind.value;
  let shown = 0;
  for (const one of articles) {
    const fits = one.textContent.toLowerCase().includes(words)
      && (!kind || one.dataset.kinds.split(" ").includes(kind));
    one.hidden = !fits;
    shown += fits;
  }
  document.getElementById("shown").textContent = shown + " of " + articles.length;
}
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
filter();
"""


def measure_lines(results):
    """The figures of every model, what went wrong, and the differences to the first model."""
    lines = []
    for name, report in results["models"].items():
        figures = ", ".join(
            f"{title} {100 * report['mean'][key]['mean']:.1f}" for key, title in NAMES.items()
        )
        perplexity = report["perplexity"] and f"{report['perplexity']:,.2f}"
        lines.append(f"{name}: {figures}, perplexity {perplexity or 'unknown'}")
        lines += [
            f"{name}: {report[key]} of {len(report['rows'])} {what}"
            for key, what in TROUBLES.items()
            if report[key]
        ]
    return lines + difference_lines(results)


def difference_lines(results):
    """By how much every other model differs from the first, row by row, with intervals."""
    first, *others = results["models"]
    lines = []
    for name in others:
        found = results["differences_to_first"][name]
        parts = [
            f"{NAMES[key]} {100 * found[key]['mean']:+.1f} points ("
            + " to ".join(f"{100 * bound:+.1f}" for bound in found[key]["interval"])
            + ")"
            for key in ("rouge_l", "exact_match")
        ]
        lines.append(
            f"{name} less {first}: {', '.join(parts)}, McNemar's p = "
            f"{found['exact_match']['p_value']:.3g}"
        )
    return lines


def verdict_lines(results):
    """What the judge said of every model against the first."""
    first = next(iter(results["models"]))
    return [
        f"{name} against {first}: "
        + ", ".join(f"{report[one]['count']} {one}" for one in ("win", "tie", "loss"))
        + f", {report['unreadable']} unreadable; {_reliability(report)}"
        for name, report in results["judge"]["against_first"].items()
    ]


def _reliability(report):
    """How far the judge looked at the order of the answers only."""
    if report["first_place"] is None:
        return "no verdict for an answer"
    return (
        f"{report['contradicting']} of the ties because it contradicted itself, "
        f"{100 * report['first_place']:.0f} % of its choices for the answer shown first"
    )


def write_results(results, output_dir):
    """Write results.json and report.html."""
    write_json(results, output_dir / "results.json")
    (output_dir / "report.html").write_text(page(results), encoding="utf-8")


def page(results):
    """The whole page as text. Rows can be searched, and filtered by what became of them."""
    models = list(results["models"])
    kinds = [
        ("all-right", "all right (exact match)"),
        ("none-right", "none right"),
        ("differ", "right in some only"),
    ]
    for number, name in enumerate(models[1:], 1):
        if name in results.get("judge", {}).get("outcomes", {}):
            kinds += [
                (f"{outcome}-{number}", f"{name} {WORDS[outcome]}")
                for outcome in ("win", "tie", "loss")
            ]
    choices = "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in kinds)
    articles = "\n".join(_article(results, models, row) for row in range(len(results["questions"])))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(" / ".join(models))}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(" / ".join(models))}</h1>
<p>{escape(results["protocol"])}</p>
<div class="scroll">{_measures(results, models)}</div>
{"".join(f"<p>{escape(line)}</p>" for line in difference_lines(results))}
{_verdicts(results, models)}
<form>
<input name="search" type="search" placeholder="search questions and answers" aria-label="search">
<select name="kind" aria-label="which rows"><option value="">all rows</option>{choices}</select>
<span id="shown"></span>
</form>
{articles}
<script>{SCRIPT}</script>
</body>
</html>
"""


def _measures(results, models):
    """The table of figures: a column for every model."""
    lines = [("", [escape(name) for name in models])]
    reports = list(results["models"].values())
    for name, title in NAMES.items():
        lines.append((title, [_with_interval(report["mean"][name]) for report in reports]))
    for name, title in (
        ("perplexity", "perplexity of the reference, per token"),
        ("bits_per_character", "bits per character of the reference"),
        ("answer_characters", "answer length, characters"),
        ("answers_cut", "answers cut for length"),
        ("questions_without_room", "questions too long for the context"),
        ("references_without_room", "references too long for the context"),
    ):
        lines.append((title, [_number(report[name]) for report in reports]))
    rows = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in [title, *cells]) + "</tr>"
        for title, cells in lines[1:]
    )
    head = "".join(f"<th>{cell}</th>" for cell in ["", *lines[0][1]])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _with_interval(entry):
    text = f"{100 * entry['mean']:.1f} %"
    if "interval" in entry:
        low, high = entry["interval"]
        text += f" <small>({100 * low:.1f} to {100 * high:.1f})</small>"
    return text


def _number(value):
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _verdicts(results, models):
    """What the judge said of every model against the first."""
    if "judge" not in results:
        return ""
    lines = []
    for name, report in results["judge"]["against_first"].items():
        shares = ", ".join(
            f"{WORDS[one]} {report[one]['count']} <small>({_range(report[one])})</small>"
            for one in ("win", "tie", "loss")
        )
        lines.append(
            f"<p>{escape(name)} against {escape(models[0])}, judged by "
            f"{escape(results['judge']['name'])}: {shares}; unreadable "
            f"{report['unreadable']}; {_reliability(report)}; sign test p = "
            f"{report['p_value']:.3g}</p>"
        )
    return "\n".join(lines)


def _range(entry):
    low, high = entry["interval"]
    return f"{100 * entry['share']:.0f} %, {100 * low:.0f} to {100 * high:.0f}"


def _article(results, models, row):
    """One question with its reference and the answers side by side."""
    item, kinds, sections = results["questions"][row], [], []
    right = [results["models"][name]["rows"][row]["exact_match"] == 1 for name in models]
    kinds += ["all-right"] * all(right) + ["none-right"] * (not any(right))
    kinds += ["differ"] * (any(right) and not all(right))
    outcomes = results.get("judge", {}).get("outcomes", {})
    for number, name in enumerate(models):
        mark = ""
        if name in outcomes:
            outcome = outcomes[name][row]
            kinds.append(f"{outcome}-{number}")
            mark = f' <small class="{outcome}">{WORDS[outcome]}</small>'
        scores = results["models"][name]["rows"][row]
        sections.append(
            f"<section><h2>{escape(name)}{mark}</h2>"
            f'<div class="text">{escape(results["models"][name]["answers"][row]["answer"])}</div>'
            f"<small>{NAMES['rouge_l']} {100 * scores['rouge_l']:.0f} %, "
            f"{NAMES['bleu_2']} {100 * scores['bleu_2']:.0f} %"
            f"{', exact match' if scores['exact_match'] else ''}</small></section>"
        )
    sections.append(
        f'<section><h2><small>reference</small></h2><div class="text">'
        f"{escape(item['reference'])}</div></section>"
    )
    return (
        f'<article data-kinds="{" ".join(kinds)}"><div class="text"><small>{row + 1}</small> '
        f'{escape(item["question"])}</div><div class="answers">{"".join(sections)}</div>'
        "</article>"
    )


def draw_bars(results, path):
    """Draw the measures of all models as bars with their intervals.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure

    fonts = ["DejaVu Sans", *CHINESE_FONTS & set(font_manager.get_font_names())]
    with rc_context({"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # where there is no such font: boxes
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot(ylabel="%", ylim=(0, 100))
        width = 0.8 / len(results["models"])
        for number, (name, report) in enumerate(results["models"].items()):
            first = (number - (len(results["models"]) - 1) / 2) * width
            entries = [report["mean"][measure] for measure in NAMES]
            axes.bar(
                [place + first for place in range(len(NAMES))],
                [100 * entry["mean"] for entry in entries],
                width,
                yerr=list(zip(*map(_reach, entries), strict=True)),
                capsize=2,
                label=name,
            )
        axes.set_xticks(range(len(NAMES)), NAMES.values())
        axes.legend()
        figure.savefig(path, dpi=120)


def _reach(entry):
    """How far an interval reaches below and above its mean, in percent; NaN draws nothing."""
    if "interval" not in entry:
        return math.nan, math.nan
    low, high = entry["interval"]
    return 100 * max(0, entry["mean"] - low), 100 * max(0, high - entry["mean"])
