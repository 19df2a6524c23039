"""The comparison of models as one HTML page that needs nothing from anywhere, and as a picture.

    Path("report.html").write_text(page(results), encoding="utf-8")
    draw_bars(results, "report.png")

`results` is what eval.py compare writes as results.json. What models and data sets wrote is text
here, never markup, and the page forbids itself (Content-Security-Policy) every request.
"""

from html import escape

NAMES = {"bleu_2": "BLEU-2", "rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L",
         "exact_match": "exact match"}
WORDS = {"win": "won", "tie": "tied", "loss": "lost", None: "unreadable"}

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --good: #2a8a4a; --bad: #b33; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 90rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
small { opacity: .7; }
form { position: sticky; top: 0; background: Canvas; padding: .6rem 0; display: flex;
  flex-wrap: wrap; gap: .6rem; align-items: center; border-bottom: 1px solid var(--line); }
input, select { font: inherit; padding: .35rem .5rem; max-width: 100%; }
input { flex: 1 1 12rem; }
article { border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0; padding: .8rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; gap: .8rem; margin-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.answers > section { background: var(--soft); border-radius: .4rem; padding: .6rem; }
.win { color: var(--good); } .loss { color: var(--bad); }
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


def page(results):
    """The whole page as text. Rows can be searched, and filtered by what became of them."""
    models = list(results["models"])
    kinds = [("all-right", "all right (exact match)"), ("none-right", "none right"),
             ("differ", "right in some only")]
    for number, name in enumerate(models[1:], 1):
        if name in results.get("judge", {}).get("outcomes", {}):
            kinds += [(f"{outcome}-{number}", f"{name} {WORDS[outcome]}")
                      for outcome in ("win", "tie", "loss")]
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
    ):
        lines.append((title, [_number(report[name]) for report in reports]))
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in [title, *cells]) + "</tr>"
                   for title, cells in lines[1:])
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
            for one in ("win", "tie", "loss"))
        lines.append(f"<p>{escape(name)} against {escape(models[0])}, judged by "
                     f"{escape(results['judge']['name'])}: {shares}; unreadable "
                     f"{report['unreadable']}; sign test p = {report['p_value']:.3g}</p>")
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
            f'<section><h2>{escape(name)}{mark}</h2>'
            f'<div class="text">{escape(results["models"][name]["answers"][row]["answer"])}</div>'
            f'<small>{NAMES["rouge_l"]} {100 * scores["rouge_l"]:.0f} %, '
            f'{NAMES["bleu_2"]} {100 * scores["bleu_2"]:.0f} %'
            f'{", exact match" if scores["exact_match"] else ""}</small></section>')
    sections.append(f'<section><h2><small>reference</small></h2><div class="text">'
                    f'{escape(item["reference"])}</div></section>')
    return (f'<article data-kinds="{" ".join(kinds)}"><div class="text"><small>{row + 1}</small> '
            f'{escape(item["question"])}</div><div class="answers">{"".join(sections)}</div>'
            "</article>")


def draw_bars(results, path):
    """Draw the measures of all models as bars with their intervals.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(ylabel="%", ylim=(0, 100))
    models = results["models"]
    width = 0.8 / len(models)
    for number, (name, report) in enumerate(models.items()):
        entries = [report["mean"][measure] for measure in NAMES]
        heights = [100 * entry["mean"] for entry in entries]
        bounds = [entry.get("interval", (entry["mean"], entry["mean"])) for entry in entries]
        spread = [[max(0, height - 100 * low) for height, (low, _) in zip(heights, bounds,
                                                                       strict=True)],
                  [max(0, 100 * high - height) for height, (_, high) in zip(heights, bounds,
                                                                         strict=True)]]
        places = [place + (number - (len(models) - 1) / 2) * width for place in range(len(NAMES))]
        axes.bar(places, heights, width, yerr=spread, capsize=2, label=name)
    axes.set_xticks(range(len(NAMES)), NAMES.values())
    axes.legend()
    figure.savefig(path, dpi=120)
