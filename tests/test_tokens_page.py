"""The page of `cepo tokens`: nothing in it acts but its own script, and it does what a person asks of it."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Browser

from cepo.report import page
from cepo.report.samples import Group, Rollout, Sample
from cepo.report.shades import scales

HOSTILE = [
    "</script><script>window.hacked = 1</script>", "<img src=x onerror='window.hacked=1'>", "<!--<script>", "]]>", "&",
    "\"'`${window.hacked=1}{data}{policy}", "\u202egnorw\u202c", "\x1b[31m\x00\r", "\u2028\u2029", "\ud800", "\ufeff",
    "שלום", "عشرة", "😀", "\n\n", "",
]  # fmt: skip
BLOCK = r'<script type="application/json" id="([a-z0-9-]+)">(.*?)</script>'


def sample(step: int, lam: float | None = 0.5, tokens: int = 12, groups: int = 2) -> Sample:
    draw = random.Random(step)

    def rollout(right: bool) -> Rollout:
        columns: dict[str, list[float | None]] = {"logprobs": [-draw.expovariate(2) for _ in range(tokens)]}
        if lam:
            evidence = [draw.gauss(0, 1) for _ in range(tokens)]
            columns |= {
                "positive_logprobs": [e - 1 for e in evidence],
                "negative_logprobs": [-1.0] * tokens,
                "evidence": [*evidence],
                "weight": [1.5, 0.5, *(draw.uniform(0.5, 1.5) for _ in range(tokens - 2))],
            }
        text = [" 7", "+", *draw.choices([*HOSTILE, " two", " and", "."], k=tokens - 2)]
        advantage = None if lam is None else 0.7 if right else -1.2
        return Rollout(right, float(right), advantage, "</p>14", "15", not right, text, columns)

    made = [Group(f"{HOSTILE[0]} {g}\u202e", "14", [rollout(i % 2 == 1) for i in range(4)]) for g in range(groups)]
    return Sample(step, "cepo", lam, 0.5, made)


def written(path: Path, *steps: Sample) -> Path:
    path.write_text(page.render(HOSTILE[0], steps, scales(steps), "weight", steps[0].step, 1), encoding="utf-8")
    return path


def test_what_a_model_wrote_is_data_and_nothing_else(tmp_path: Path) -> None:
    text = written(tmp_path / "page.html", sample(1), sample(20)).read_text(encoding="utf-8")
    blocks = dict(re.findall(BLOCK, text, re.DOTALL))
    assert list(blocks) == ["about", "step-1", "step-20"]
    rest = re.sub(BLOCK, "", text, flags=re.DOTALL)
    for block in blocks.values():
        assert block.isascii()
        assert not re.search("[<>&\x00-\x1f]", block)
    assert rest.count("<script>") == rest.count("</script>") == 1
    assert "hacked" not in rest
    tokens = json.loads(blocks["step-1"])["groups"][0]["rollouts"][0]["tokens"]
    assert len(tokens) == 12
    assert HOSTILE[0] in json.loads(blocks["step-1"])["groups"][0]["prompt"]
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u2028\ud800]", "".join(tokens))
    assert all(tokens)


def test_the_policy_allows_the_pages_own_script_and_no_network(tmp_path: Path) -> None:
    text = written(tmp_path / "page.html", sample(1)).read_text(encoding="utf-8")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|//[a-z]|url\(|@import| src=| href=| on[a-z]+=", re.sub(BLOCK, "", text))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = browser.binary()
    if path is None:
        pytest.skip(f"needs one of {', '.join(browser.NAMES)}, and there is none on the PATH")
    opened = Browser(path, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def token(place: int, of: str = ".tokens") -> str:
    return f"document.querySelectorAll('{of} span')[{place}]"


def tip(opened: Browser) -> dict[str, str] | None:
    """What the box says that belongs to a token, by name; None while it is hidden."""
    return opened.run("""(box => box.hidden ? null : Object.fromEntries(
        [...box.querySelectorAll("dt")].map(name => [name.textContent, name.nextSibling.textContent])
        .concat([["token", box.querySelector("code").textContent]])))(document.getElementById("tip"))""")  # type: ignore[no-any-return]


def choose(opened: Browser, name: str, value: Any) -> None:
    opened.run(f"""(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event("input", {{bubbles: true}}));
        e.dispatchEvent(new Event("change", {{bubbles: true}})); }})(document.getElementById("{name}"))""")


def looks(opened: Browser, element: str, what: str) -> str:
    return str(opened.run(f"getComputedStyle({element}).{what}"))


def test_a_person_finds_their_way(chromium: Browser, tmp_path: Path) -> None:
    steps = sample(1), sample(20), sample(40, lam=0.0, groups=1), sample(60, lam=None, groups=1)
    chromium.open(written(tmp_path / "page.html", *steps))
    said = len(chromium.said)

    # Right and wrong side by side.
    assert chromium.run("document.getElementById('at').textContent") == "1"
    assert chromium.run("[...document.querySelectorAll('h2')].map(e => e.textContent)") == [
        "✓ Right (2)",
        "✗ Wrong (2)",
    ]
    left, right = (
        chromium.run(f"document.querySelector('.{s}').getBoundingClientRect().x") for s in ("right", "wrong")
    )
    assert left + 300 < right

    # Hover: the numbers of that token; elsewhere: none.
    chromium.hover(token(1))
    first = sample(1).groups[0].rollouts[1]
    shown = tip(chromium)
    assert shown is not None
    assert (shown["token"], shown["weight"]) == ("+", "0.5")
    assert float(shown["evidence"].replace("\u2212", "-")) == pytest.approx(first.columns["evidence"][1], rel=0.01)
    assert {"P", "P+", "P\u2212", "evidence", "weight"} <= shown.keys()
    chromium.hover("document.querySelector('h1')")
    assert tip(chromium) is None

    # Weight 1.5 and 0.5: two colours, and two kinds of line for whoever sees one colour.
    blue, orange = (looks(chromium, token(place), "backgroundColor") for place in (0, 1))
    assert blue != orange
    assert [looks(chromium, token(place), "textDecorationStyle") for place in (0, 1)] == ["solid", "dotted"]

    # Another choice of colour.
    choose(chromium, "by", "evidence")
    assert "wrong answer" in chromium.run("document.getElementById('legend').textContent")
    assert (looks(chromium, token(0), "backgroundColor"), looks(chromium, token(1), "backgroundColor")) != (
        blue,
        orange,
    )
    choose(chromium, "by", "weight")

    # Keyboard: one stop a rollout, arrows within and between.
    chromium.run(f"{token(0)}.focus()")
    chromium.press("ArrowRight")
    assert (tip(chromium) or {})["token"] == "+"
    chromium.press("End", "ArrowDown")
    assert chromium.run("document.activeElement.textContent") == " 7"
    assert chromium.run("document.querySelectorAll('.tokens [tabindex=\"0\"]').length") == 4
    chromium.press("Escape")
    assert tip(chromium) is None

    # The slider, by keys; a step in which nothing was weighed says so.
    chromium.run("document.getElementById('step').focus()")
    chromium.press("ArrowRight")
    assert chromium.run("document.getElementById('at').textContent") == "20"
    choose(chromium, "prompt", 1)
    assert chromium.run("document.getElementById('task').textContent").count("</script> 1") == 1
    chromium.press("ArrowRight")
    assert "lambda is 0" in chromium.run("document.getElementById('sides').textContent")
    assert "λ = 0" in chromium.run("document.getElementById('run').textContent")
    assert "advantage \u22121.2" in chromium.run("document.getElementById('sides').textContent")
    chromium.press("ArrowRight")
    assert "λ" not in chromium.run("document.getElementById('run').textContent")
    assert "advantage" not in chromium.run("document.getElementById('sides').textContent")

    # Dark, and on a phone: one column, nothing wider than the screen, a tap in place of hovering.
    choose(chromium, "step", 0)
    light = looks(chromium, "document.body", "backgroundColor")
    chromium.dark(True)
    assert looks(chromium, "document.body", "backgroundColor") != light
    assert looks(chromium, token(0), "backgroundColor") != blue
    chromium.dark(False)
    chromium.size(390, 844, phone=True)
    assert chromium.run("document.documentElement.scrollWidth") == 390
    assert chromium.run("document.querySelector('.right').offsetLeft === document.querySelector('.wrong').offsetLeft")
    chromium.tap(token(1, ".wrong .tokens"))
    assert (tip(chromium) or {})["token"] == "+"
    assert chromium.run(f"{token(1, '.wrong .tokens')}.tabIndex") == 0
    assert chromium.run("document.getElementById('tip').getBoundingClientRect().bottom") == 844
    chromium.size(1280, 800)

    # No markup came of what a model wrote, nothing was asked of any network, nothing was complained of.
    assert chromium.run("document.querySelectorAll('img, main script').length") == 0
    assert chromium.run("window.hacked === undefined")
    assert "</script>" in chromium.run("document.getElementById('run').textContent")
    events = [(e["method"], e["params"]) for e in chromium.said[said:]]
    assert not [e for e in events if e[0] in ("Network.requestWillBeSent", "Log.entryAdded", "Runtime.exceptionThrown")]


def test_ten_thousand_tokens_open_at_once(chromium: Browser, tmp_path: Path) -> None:
    path = written(tmp_path / "page.html", *(sample(step, tokens=2500, groups=1) for step in (1, 2)))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        chromium.open(path)
        seconds.append(time.perf_counter() - start)
    assert chromium.run("document.querySelectorAll('.tokens span').length") == 10_000
    assert min(seconds) < 3  # about 0.4 s on one free core: 3 s stand for a busy machine


def test_the_policy_holds_against_markup_that_got_in(chromium: Browser, tmp_path: Path) -> None:
    path = written(tmp_path / "page.html", sample(1))
    inside = '<script>window.hacked = 1</script><img src=x onerror="window.hacked=1"></body>'
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", inside), encoding="utf-8")
    chromium.open(path)
    assert chromium.run("window.hacked === undefined")
    assert chromium.run("document.querySelectorAll('.tokens').length") == 4
