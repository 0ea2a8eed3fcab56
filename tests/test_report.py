"""The report of a run: one page that needs nothing else, in which nothing of the run is markup."""

import json
from html.parser import HTMLParser

import pytest

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.report import main, write_report

VOID = {"meta", "br", "img", "input", "link"}


class Page(HTMLParser):
    """Check that tags are balanced and that nothing outside the page is named; collect its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href") or value.startswith(("#", "data:image/png"))
            assert "url(" not in (value or "") or "url(#" in value
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _step(step, **values):
    return {"step": step, "loss": 3 / step, "grad_norm": 1.0, "learning_rate": 1e-3, **values}


def _write(folder, name, lines, end="\n"):
    text = "\n".join(json.dumps(line) for line in lines) + end
    (folder / name).write_text(text)


@pytest.fixture
def run(tmp_path):
    """A finished run with everything there is."""
    steps = [
        _step(s, tokens_per_s=10.0 * s, mem_peak_bytes=2**21, mfu=None) for s in range(1, 1300)
    ]
    evaluations = [{"step": s, "eval_loss": 2.5 - s / 1e3, "eval_tokens": 9} for s in (0, 600)]
    _write(tmp_path, "metrics.jsonl", [evaluations[0], *steps, evaluations[1]])
    load = {"share": [0.75, 0.25], "max_over_mean": 1.5, "rank_max_over_mean": 1.25}
    load |= {"dead_experts": [], "layer": "layers.<0>"}
    _write(tmp_path, "expert_load.jsonl", [{"step": s, **load} for s in (1, 2)])
    sample = {"prompt": "<script>alert(1)</script>", "expected": "a & b"}
    answers = ["first <img src=x onerror=alert(1)>", "last"]
    lines = [sample | {"step": 600 * i, "answer": answer} for i, answer in enumerate(answers)]
    _write(tmp_path, "samples.jsonl", lines)
    plan = {"predicted": {"components": {"parameters": 2**20}, "peak_bytes": 2**22}}
    plan["measured"] = {"components": {"parameters": 2**20}, "peak_bytes": 3 * 2**20}
    record = {"status": "finished", "plan": plan, "resolved": {"num_steps": 1299}}
    record["options"] = {"model": {"model_name_or_path": "org/<model>"}, "hub_token": "s3cretword"}
    _write(tmp_path, "run.json", [record])
    return tmp_path


def test_a_page_shows_all_of_a_run_as_text(run, capsys):
    main([str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    html = (run / "report.html").read_text()
    page = Page(html)
    assert page.tags.count("svg") == 6 and "script" not in page.tags
    assert page.tags.count("img") == 0 and len(html) < 500_000
    for text in ("org/<model>", "1,299 of 1,299 steps", "<script>alert(1)</script>", "a & b",
                 "first <img", "last", "4.00 MiB", "held-out loss, best", "REDACTED"):  # fmt: skip
        assert text in page.text, text
    assert "s3cretword" not in html


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    _write(tmp_path, "metrics.jsonl", [_step(1), _step(2)], end='\n{"step": 3, "lo')
    page = Page(write_report(tmp_path).read_text())
    assert "not finished: it trains, or was stopped, 2 steps" in page.text
    (tmp_path / "metrics.jsonl").write_text("")
    assert "0 steps" in Page(write_report(tmp_path).read_text()).text  # over its own page


def test_what_is_no_report_is_not_replaced(run):
    other = run / "notes.html"
    other.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"notes.html exists and is no report of a run"):
        write_report(run, other)
    assert other.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', "metrics.jsonl:1 has loss .low."),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl:1 must hold a JSON object, but it is"),
        ("expert_load.jsonl", '{"step": 1}\n', "expert_load.jsonl:1 must hold dead_experts"),
        ("run.json", "{", "run.json must hold a JSON object"),
    ],
)
def test_damaged_files_are_named(run, name, text, message):
    (run / name).write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        write_report(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(
        ConfigurationError, match="holds no metrics.jsonl; it must be the --output_dir"
    ):
        write_report(tmp_path)
    with pytest.raises(ConfigurationError, match="RUN must be one output folder of a run"):
        main([])
