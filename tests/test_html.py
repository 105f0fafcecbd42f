import ast
import base64
import hashlib
import html as escapes
import itertools
import json
import math
import random
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from captum_llm_ext.result import GenerationAttributionResult
from captum_llm_ext.result import page as html
from captum_llm_ext.result.page.provenance import provenance_rows

SOURCE = Path(html.__file__)
DATA = Path(__file__).parent / "data"
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "</script ",
    "<!--<script ",
    "&amp; &lt;b&gt; &#60;",
    "]]> --> <img src=x onerror='window.hacked=1'>",
    "\"'`${window.hacked=1} $title $data \\u003c",
    "line\u2028separator\u2029 tab\t nul\x00",
    "half a pair \ud83d, a whole \U0001f600, 北京, مرحبا",
]


def example(n_prompt=6, n_target=5, seed=0, **changes):
    """Attributions that add up: full = empty + prompt + earlier output."""
    draw = random.Random(seed)
    prompt = [f" p{i}" for i in range(n_prompt)]
    output = [f" t{i}" for i in range(n_target)]
    token_attr = [[draw.gauss(0, 1) for _ in prompt] for _ in output]
    output_attr = [
        [draw.gauss(0, 1) if j < t else 0.0 for j in range(n_target)] for t in range(n_target)
    ]
    empty = [-5 - draw.random() for _ in output]
    data = {
        "format": 1,
        "prompt": [{"text": "<s>", "feature": None}]
        + [{"text": text, "feature": i} for i, text in enumerate(prompt)],
        "output": [{"text": text, "feature": i} for i, text in enumerate(output)],
        "input_tokens": prompt,
        "output_features": output,
        "output_tokens": output,
        "token_attr": token_attr,
        "token_attr_se": [[0.01 + 0.01 * draw.random() for _ in prompt] for _ in output],
        "output_attr": output_attr,
        "output_attr_se": [
            [0.01 if j < t else 0.0 for j in range(n_target)] for t in range(n_target)
        ],
        "seq_attr": [sum(column) for column in zip(*token_attr, strict=True)],
        "full_values": [
            e + sum(a) + sum(b) for e, a, b in zip(empty, token_attr, output_attr, strict=True)
        ],
        "empty_values": empty,
        "efficiency_gap": [0.0] * n_target,
        "n_evaluations": 123,
        "attr_target": "log_prob",
        "method": "ShapleyValueSampling",
        "estimate": True,
        "provenance": {"seed": 7, "versions": {"captum": "0.9.0"}},
    }
    return data | changes


class Parsed(HTMLParser):
    """Elements with their attributes, and the text directly inside each kind of element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for key in self._open[-1] if self._open else ():
            self.texts[key] = self.texts.get(key, "") + data

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)

    @property
    def data(self):
        return json.loads(self.texts["attribution-data"])


def numbers(matrix):
    return list(itertools.chain.from_iterable(matrix))


# The file ----------------------------------------------------------------------------------------


def test_page_module_imports_only_the_standard_library():
    for source in SOURCE.parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
        named = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        named += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        assert named
        own = ("captum_llm_ext.result.page.", "captum_llm_ext.base")
        others = [name for name in named if not name.startswith(own)]
        assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names


def test_page_makes_no_external_requests():
    text = html.page(example())
    parsed = Parsed(text)
    assert not [a for _, attributes in parsed.elements for a in attributes if a in {"src", "href"}]
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest", text)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_content_security_policy_allows_only_own_script_and_style():
    parsed = Parsed(html.page(example()))
    (policy,) = [a["content"] for tag, a in parsed.elements if tag == "meta" and "http-equiv" in a]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    script = parsed.texts["script"].removeprefix(parsed.texts["attribution-data"])
    for rule, content in [("script-src", script), ("style-src", parsed.texts["style"])]:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_escaped(hostile):
    data = example()
    data["prompt"][1]["text"] = data["input_tokens"][0] = hostile
    data["output"][2]["text"] = data["output_features"][2] = hostile
    data["provenance"] = {hostile: hostile}
    text = html.page(data, title=hostile)
    parsed = Parsed(text)
    harmless = Parsed(html.page(example(provenance={"one": "entry"})))
    for name in ("prompt", "output", "input_tokens", "output_features"):
        assert parsed.data[name] == data[name]
    assert parsed.data["noted"][-1] == [hostile.replace("_", " "), hostile]
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in harmless.elements]
    # HTML itself knows neither the character NUL nor half a pair: both read as "unknown".
    want = re.sub("[\x00\ud83d]", "�", hostile)
    assert re.sub("[\x00\ud83d]", "�", parsed.texts["h1"]) == want
    assert re.sub("[\x00\ud83d]", "�", parsed.texts["title"]) == want
    assert text.encode("utf-8")


@pytest.mark.parametrize("name", ["token_attr", "token_attr_se", "output_attr", "output_attr_se"])
def test_numbers_are_kept_to_five_digits(name):
    data = example(20, 10, seed=3)
    data[name][4][1] = 1.2345678e-9
    data[name][5][2] = -9876543.21
    data[name][6][0] = 100000.0
    assert numbers(Parsed(html.page(data)).data[name]) == pytest.approx(
        numbers(data[name]),
        rel=5.1e-5,
        abs=0,
    )


def test_nan_is_null():
    data = example()
    data["token_attr"][1][2] = math.nan
    data["token_attr_se"][0][0] = None
    data["full_values"][0] = math.inf
    data["provenance"] = {"noise_floor": math.nan}
    kept = Parsed(html.page(data)).data
    assert kept["token_attr"][1][2] is None
    assert kept["token_attr"][1][1] == pytest.approx(data["token_attr"][1][1], rel=1e-4)
    assert kept["token_attr_se"][0][0] is None
    assert kept["full_values"][0] is None
    assert kept["provenance"]["noise_floor"] is None


def test_data_is_embedded_once_and_small():
    data = example(200, 100)
    data["token_attr"][7][3], data["output_attr"][9][2] = 1.2345e77, -5.4321e78
    text = html.page(data)
    assert text.count("1.2345e+77") == text.count("-5.4321e+78") == 1
    assert len(text.encode()) < 1_000_000
    assert len(html.fragment(data).encode()) < 1_000_000


def test_input_data_is_unchanged():
    data = example()
    before = json.dumps(data)
    html.page(data)
    assert json.dumps(data) == before


def test_fragment_is_one_iframe():
    data = example()
    data["output"][0]["text"] = HOSTILE[1]
    parsed = Parsed(html.fragment(data))
    ((tag, attributes),) = parsed.elements
    assert tag == "iframe"
    assert attributes["srcdoc"] == html.page(data)
    assert attributes["title"]


@pytest.mark.parametrize(
    ("texts", "layout"),
    [
        (["name", "city", "job"], "list"),
        (["Dave", " lives", " here"], "text"),
        (["un", "happy", " man"], "text"),
        (["北京", "是", "首都"], "text"),
        (["name"], "text"),
    ],
)
def test_adjoining_names_use_the_list_layout(texts, layout):
    data = example(len(texts), 2)
    data["prompt"] = [{"text": text, "feature": i} for i, text in enumerate(texts)]
    assert Parsed(html.page(data)).data["prompt_layout"] == layout
    data["prompt_layout"] = "list"
    assert Parsed(html.page(data)).data["prompt_layout"] == "list"


def test_missing_pieces_fall_back_to_names():
    data = example(prompt=[], output=[])
    kept = Parsed(html.page(data)).data
    assert kept["output"] == example()["output"]
    assert kept["prompt"] == example()["prompt"][1:]
    fixed = example(prompt=[], output=[], output_features=None, output_attr=None)
    fixed["output_attr_se"] = None
    pieces = Parsed(html.page(fixed)).data["output"]
    assert pieces == [{"text": text, "feature": None} for text in fixed["output_tokens"]]


def test_title_is_the_answer_cut_at_a_word():
    data = example(2, 40)
    heading = Parsed(html.page(data)).texts["h1"]
    answer = "".join(piece["text"] for piece in data["output"]).strip()
    shown = re.fullmatch(r"What made the model write “(.*)…”", heading)[1]
    assert answer.startswith(shown + " ")
    assert len(shown) <= 60


@pytest.mark.parametrize("role", ["template", None])
def test_title_of_an_answer_of_one_special_token(role):
    piece = {"text": "</s>" if role else "", "feature": 0, "role": role}
    data = example(2, 1)
    data = data | {"output": [piece], "output_tokens": ["</s>"]}
    assert Parsed(html.page(data)).texts["h1"] == "What made the model write “</s>”"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"output_features": None}, "`output_attr`.*both"),
        ({"token_attr": [[0.0] * 6] * 4}, "`token_attr` has 4 rows.*5 rows of 6"),
        ({"token_attr_se": [[0.0] * 7] * 5}, r"`token_attr_se` has 5 rows of \[7\]"),
        ({"output": [{"text": "x", "feature": 0}]}, "`output` has 1 entries for 5 tokens"),
        ({"empty_values": [0.0]}, "`empty_values` has 1 entries"),
        ({"prompt": [{"text": "x", "feature": 6}]}, "`prompt`.*feature 6, there are 6"),
        ({"levels": [{"name": "turn", "parts": ["a"], "part_of": [0]}]}, "'turn'.*each of the 6"),
        ({"levels": [{"name": "turn", "parts": ["a"], "part_of": [1] * 6}]}, "one of its 1 parts"),
    ],
)
def test_inconsistent_data_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        html.page(example(**change))


def test_missing_data_is_named():
    data = example()
    del data["token_attr"]
    with pytest.raises(ValueError, match="lacks token_attr"):
        html.page(data)


# The page in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no chromium to open the page in")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        page = browser.new_page()
        page.set_default_timeout(20_000)
        yield page
        browser.close()


@pytest.fixture
def view(tab, tmp_path):
    """Opens data as a page; no error, no dialog and no request may happen while it is open."""
    seen = []
    notes = {
        "pageerror": str,
        "console": lambda message: message.text,
        "dialog": lambda dialog: dialog.dismiss() or dialog.message,
        "request": lambda request: request.url,
    }
    listeners = {event: lambda x, note=note: seen.append(note(x)) for event, note in notes.items()}

    def open_text(text):
        path = tmp_path / "view.html"
        path.write_text(text, encoding="utf-8")
        tab.mouse.move(1, 1)
        tab.goto(path.as_uri())
        assert seen == [path.as_uri()]
        seen.clear()
        return tab

    def open_view(data):
        return open_text(html.page(data))

    open_view.text = open_text
    for event, listener in listeners.items():
        tab.on(event, listener)
    yield open_view
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    tab.emulate_media(color_scheme="light")
    assert seen == []


def answer(page, token):
    return page.locator("#answer .piece").nth(token)


def prompt(page, feature):
    return page.locator("#prompt .piece").nth(feature)


def levels(page, side):
    """Signed strength of the colour of each piece, as drawn."""
    return page.evaluate(
        """(side) => Array.from(document.querySelectorAll(`#${side} .piece .ink`), (ink) => {
            const sign = ink.classList.contains("up") ? 1 : ink.classList.contains("down") ? -1 : 0;
            return sign && sign * Number(ink.style.getPropertyValue("--a"));
        })""",
        side,
    )


def having(page, side, name):
    """Indices of the pieces whose ink has this class."""
    inks = page.locator(f"#{side} .piece .ink")
    return [
        i
        for i, c in enumerate(inks.evaluate_all("all => all.map(e => e.className)"))
        if name in c.split()
    ]


def scaled(values, most=None):
    """What the colours should be: shares of the largest, drawn in steps of 1/40."""
    most = most or max(map(abs, values))
    return pytest.approx([value / most for value in values], abs=0.5 / 40 + 1e-6)


def sure(data):
    """The same data with errors too small to make anything pale."""
    tiny = [[1e-9] * len(row) for row in data["token_attr"]]
    none = [[0.0] * len(row) for row in data["output_attr"] or ()] or None
    return data | {"token_attr_se": tiny, "output_attr_se": none}


def added(rows):
    return [sum(column) for column in zip(*rows, strict=True)]


def number(text):
    return float(text.replace("−", "-").replace("+", ""))


def row_values(data, token):
    """Attributions of one token to the prompt and to the output, beside each other."""
    return data["token_attr"][token], data["output_attr"][token]


def test_whole_answer_is_selected_initially(view):
    data = sure(example())
    page = view(data)
    assert page.inner_text("#chosen-name") == "Whole answer"
    blocks = (
        ("prompt", "token_attr", "input_tokens"),
        ("answer", "output_attr", "output_features"),
    )
    for side, attr, names in blocks:
        sums = added(data[attr])
        assert levels(page, side) == scaled(sums)  # each block has its own scale
        first = page.locator(f"#top-{side} tbody tr").first
        strongest = max(range(len(sums)), key=lambda i: abs(sums[i]))
        assert first.locator(".what").inner_text() == data[names][strongest].strip()
        assert first.locator(".where").inner_text() == f"#{strongest + 1}"
        shown = first.locator(".value").inner_text().split(" ")[0]
        assert number(shown) == pytest.approx(sums[strongest], abs=0.006)
    assert "--output-unit none" in page.inner_text("#note")  # which is another question


def test_causes_come_from_prompt_answer_or_both(view):
    data = sure(example())
    page = view(data)
    answer(page, 4).click()
    of_prompt, of_output = row_values(data, 4)
    page.check("input[name=block][value=prompt]")
    assert levels(page, "prompt") == scaled(of_prompt)
    assert levels(page, "answer") == [0] * 5
    assert not page.locator("#top-answer").is_visible()
    links = page.locator("#links path").evaluate_all("all => all.map(e => e.dataset.link)")
    assert links
    assert all(link.startswith("prompt") for link in links)
    page.check("input[name=block][value=answer]")
    assert levels(page, "answer") == scaled(of_output)
    assert levels(page, "prompt") == [0] * 6
    assert not page.locator("#top-prompt").is_visible()
    page.check("input[name=block][value=both]")
    assert page.locator("#top-prompt").is_visible()
    assert page.locator("#top-answer").is_visible()


def test_hovering_a_token_shows_its_causes(view):
    data = sure(example())
    page = view(data)
    answer(page, 3).hover()
    of_prompt, of_output = row_values(data, 3)
    assert levels(page, "prompt") == scaled(of_prompt)
    assert levels(page, "answer") == scaled(of_output)
    assert levels(page, "answer")[3:] == [0, 0]
    assert having(page, "answer", "later") == [4]
    assert having(page, "answer", "chosen") == [3]
    page.mouse.move(1, 1)
    assert page.inner_text("#chosen-name") == "Whole answer"


def test_hovering_a_prompt_part_shows_its_effects(view):
    data = sure(example())
    page = view(data)
    prompt(page, 2).hover()
    column = [row[2] for row in data["token_attr"]]
    assert levels(page, "answer") == scaled(column)
    assert levels(page, "prompt") == [0] * 6
    assert having(page, "prompt", "chosen") == [2]
    most = max(range(5), key=lambda t: abs(column[t]))
    assert f"mattered most for “t{most}”" in page.inner_text("#details")


def test_click_pins_a_token_and_escape_releases_it(view):
    data = example()
    page = view(data)
    answer(page, 4).click()
    prompt(page, 1).hover()
    assert page.inner_text("#chosen-name") == "“t4”"
    cause, target, value, error = re.fullmatch(
        r"“(.*)” → “(.*)”: (\S+) ± (\S+) nats = .* times (?:as|less) probable(?:, could be noise)?",
        page.inner_text("#details"),
    ).groups()
    assert (cause, target) == ("p1", "t4")
    assert number(value) == pytest.approx(data["token_attr"][4][1], abs=0.006)
    assert number(error) == pytest.approx(data["token_attr_se"][4][1], abs=0.006)
    answer(page, 2).hover()
    assert page.inner_text("#details").startswith("“t2” → “t4”")
    page.keyboard.press("Escape")
    assert page.inner_text("#chosen-name") == "Whole answer"
    answer(page, 1).click()
    answer(page, 3).hover()
    assert page.inner_text("#details") == "“t3” comes after “t1” and cannot be its cause"
    answer(page, 1).click()
    page.mouse.move(1, 1)
    assert page.inner_text("#chosen-name") == "Whole answer"


def drag(page):
    answer(page, 1).hover()
    page.mouse.down()
    answer(page, 2).hover()
    answer(page, 3).hover()
    page.mouse.up()


def shift_click(page):
    answer(page, 3).click()
    answer(page, 1).click(modifiers=["Shift"])


def shift_arrows(page):
    answer(page, 1).focus()
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowRight")


@pytest.mark.parametrize("select", [drag, shift_click, shift_arrows])
def test_span_shows_the_sum_of_its_rows(view, select):
    data = sure(example())
    page = view(data)
    select(page)
    prompt_sum, output_sum = added(data["token_attr"][1:4]), added(data["output_attr"][1:4])
    assert page.inner_text("#chosen-name") == "“t1 t2 t3”"
    assert page.inner_text("#chosen-place") == "tokens 2–4 of 5, summed"
    assert levels(page, "prompt") == scaled(prompt_sum)
    assert levels(page, "answer") == scaled(output_sum)
    assert having(page, "answer", "chosen") == [1, 2, 3]
    assert page.evaluate("getSelection().isCollapsed")
    page.click("#clear")
    assert page.inner_text("#chosen-name") == "Whole answer"


def bridge(page):
    steps = page.locator(".step").evaluate_all(
        "all => all.map(e => [e.firstChild.firstChild.data, e.querySelector('b').textContent])"
    )
    return {name: number(value) for name, value in steps}


@pytest.mark.parametrize("tokens", [[3], [0, 1, 2, 3, 4]])
def test_bar_runs_from_empty_to_full_value(view, tokens):
    data = example()
    data["full_values"][3] += 0.5  # as of a method that is not efficient
    page = view(data)
    if len(tokens) == 1:
        answer(page, tokens[0]).hover()
    assert bridge(page) == pytest.approx(
        {
            "nothing given": sum(data["empty_values"][t] for t in tokens),
            "prompt": sum(sum(data["token_attr"][t]) for t in tokens),
            "answer so far": sum(sum(data["output_attr"][t]) for t in tokens),
            "not attributed": 0.5,
            "everything given": sum(data["full_values"][t] for t in tokens),
        },
        abs=0.051,  # drawn with one to three decimals
    )
    answer(page, 2).click()
    assert list(bridge(page)) == ["nothing given", "prompt", "answer so far", "everything given"]


def test_bar_caption_overlaps_no_mark(view):
    page = view(example())
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        boxes = page.locator(".step.end").evaluate_all(
            """all => all.map(step => ["small", "i", ".track"].map(name => {
                const box = step.querySelector(name).getBoundingClientRect();
                return [box.top, box.bottom];
            }))"""
        )
        assert len(boxes) == 2
        for (top, _), (_, mark), (_, track) in boxes:
            assert top >= max(mark, track) - 0.5
    page.set_viewport_size({"width": 1280, "height": 720})


def test_prompt_begins_on_the_first_screen_of_a_phone(view):
    result = GenerationAttributionResult.load(DATA / "rag.safetensors")
    page = view.text(result.to_html())
    page.set_viewport_size({"width": 390, "height": 844})
    try:
        assert page.locator("#prompt").bounding_box()["y"] < 844 * 2 / 3
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.check("#effect input[value=through]", force=True)  # in a row that scrolls
        page.click("#more summary")
        inside = page.locator("#tools").evaluate("e => e.scrollWidth <= e.clientWidth + 1")
        assert inside  # of the opened row nothing is cut off
    finally:
        page.set_viewport_size({"width": 1280, "height": 720})


def test_whole_answer_shows_mean_probability_per_token(view):
    data = example(full_values=[math.log(p) for p in (0.5, 0.5, 0.5, 0.5, 0.5)])
    page = view(data)
    assert "(50 % per token on average)" in page.inner_text("#details").replace("\u00a0", " ")
    answer(page, 0).click()
    assert "(50 %);" in page.inner_text("#details").replace("\u00a0", " ")


def test_nats_are_shown_as_factors(view):
    data = sure(example())
    data["token_attr"][2][1] = 4.78
    page = view(data)
    answer(page, 2).click()
    prompt(page, 1).hover()
    assert page.inner_text("#details").endswith("= 119 times as probable")


def test_scale_and_sign_switches(view):
    data = sure(example())
    data["token_attr"][0] = [0.2, -0.2, 0.0, 0.0, 0.0, 0.05]
    data["token_attr"][4][5] = -4.0
    page = view(data)
    answer(page, 0).click()
    assert levels(page, "prompt") == scaled(data["token_attr"][0])
    assert "full colour: prompt 0.200 nats" in page.inner_text("#full")
    page.click("#more summary")
    page.check("input[value=common]")
    assert levels(page, "prompt") == scaled(data["token_attr"][0], 4.0)
    assert "full colour: prompt 4.00 nats" in page.inner_text("#full")
    page.check("input[value=own]")
    colour = "all => all.slice(0, 2).map((ink) => getComputedStyle(ink).backgroundColor)"
    inks = page.locator("#prompt .piece .ink")
    up, down = inks.evaluate_all(colour)
    assert up != down
    page.check("input[value=absolute]")
    up, down = inks.evaluate_all(colour)
    assert up == down
    assert page.inner_text("#low") == "nothing"


LEVELS = [
    {"name": "turn", "parts": ["p0 … p5"], "part_of": [0] * 6},
    {"name": "sentence", "parts": ["p0 p1 p2", "p3", "p4 p5"], "part_of": [0, 0, 0, 1, 2, 2]},
]


def at_level(row, level):
    """Sums over the parts of a level."""
    sums = [0.0] * len(level["parts"])
    for value, part in zip(row, level["part_of"], strict=True):
        sums[part] += value
    return sums


def test_level_switch_is_absent_without_levels(view):
    page = view(example(levels=[]))
    for side in ("prompt", "answer"):
        assert page.locator(f"#{side}-levels").count() == 1
        assert not page.locator(f"#{side}-levels").is_visible()


def test_first_view_is_the_coarsest_level_and_keys_refine_it(view):
    """A level of a single part, as the turn here, tells nothing."""
    page = view(example(levels=LEVELS))
    switch = page.get_by_role("group", name="Prompt by")
    assert switch.locator("span").all_inner_texts() == ["sentence", "finest"]
    assert switch.get_by_role("radio", name="sentence").is_checked()
    assert page.locator("#prompt .piece").count() == 3
    page.keyboard.press("+")
    assert switch.get_by_role("radio", name="finest").is_checked()
    assert page.locator("#prompt .piece").count() == 6
    page.keyboard.press("+")
    page.keyboard.press("-")
    assert page.locator("#prompt .piece").count() == 3


@pytest.mark.parametrize("level", LEVELS[1:], ids=lambda level: level["name"])
def test_coarser_level_sums_prompt_parts(view, level):
    data = sure(example(levels=LEVELS))
    page = view(data)
    answer(page, 3).click()
    page.get_by_role("radio", name=level["name"]).check()
    of_prompt, of_output = row_values(data, 3)
    sums = at_level(of_prompt, level)
    texts = [
        "".join(f" p{i}" for i in range(6) if level["part_of"][i] == k) for k in range(len(sums))
    ]
    assert page.locator("#prompt .piece").all_text_contents() == texts
    assert levels(page, "prompt") == scaled(sums)
    assert levels(page, "answer") == scaled(of_output)
    assert page.inner_text("#chosen-name") == "“t3”"  # what was kept still is
    assert set(level["parts"]) <= set(page.locator("#top-prompt .what").all_inner_texts())
    page.get_by_role("radio", name="finest").check()
    assert levels(page, "prompt") == scaled(of_prompt)


def test_pinned_prompt_part_is_kept_across_levels(view):
    data = sure(example(levels=LEVELS))
    page = view(data)
    page.get_by_role("radio", name="finest").check()
    prompt(page, 4).click()
    page.get_by_role("radio", name="sentence").check()
    assert page.inner_text("#chosen-name") == "“p4 p5”"
    assert page.inner_text("#chosen-place") == "sentence 3 of 3 in the prompt"
    assert having(page, "prompt", "chosen") == [2]
    column = [at_level(row, LEVELS[1])[2] for row in data["token_attr"]]
    assert levels(page, "answer") == scaled(column)
    page.get_by_role("radio", name="finest").check()
    assert page.inner_text("#chosen-name") == "“p4”"


def test_unknown_covariance_adds_errors_in_quadrature(view):
    data = example(levels=LEVELS)
    data["token_attr"][2], data["token_attr_se"][2] = [3.0] * 6, [0.3, 0.4, 1.2, 0.1, 3.0, 4.0]
    page = view(data)
    answer(page, 2).click()
    page.get_by_role("radio", name="sentence").check()
    prompt(page, 0).hover()
    assert page.inner_text("#details").startswith("“p0 p1 p2” → “t2”: +9.00 ± 1.30 nats")
    prompt(page, 2).hover()
    assert page.inner_text("#details").endswith(
        "+6.00 ± 5.00 nats = 403 times as probable, could be noise"
    )
    note = page.inner_text("#note")
    assert "± is approximate here: the errors of the parts that are added up are taken as" in note


@pytest.mark.parametrize(("errors", "estimate"), [(0.0, True), (None, False), (0.25, True)])
def test_errors_are_mentioned_only_if_present(view, errors, estimate):
    """Not for what is exact, nor where nothing is estimated."""
    data = example(estimate=estimate)
    for name in ("token_attr", "output_attr"):
        data[f"{name}_se"] = [[errors] * len(row) for row in data[name]]
    page = view(data)
    answer(page, 2).click()
    shown = page.inner_text("#note") + page.inner_text("#top-prompt") + page.inner_text("#details")
    assert ("±" in shown) == bool(errors)


def test_common_scale_and_bar_follow_the_level(view):
    data = sure(example(levels=LEVELS))
    page = view(data)
    answer(page, 1).click()
    before = bridge(page)
    page.get_by_role("radio", name="finest").check()
    assert bridge(page) == before
    page.get_by_role("radio", name="sentence").check()
    page.click("#more summary")
    page.check("input[value=common]")
    cells = [at_level(row, LEVELS[1]) for row in data["token_attr"]]
    most = max(abs(value) for row in cells for value in row)
    assert levels(page, "prompt") == scaled(at_level(data["token_attr"][1], LEVELS[1]), most)


def test_fixed_text_stands_between_pieces_of_a_part(view):
    data = example(levels=LEVELS)
    data["prompt"].insert(3, {"text": " held", "feature": None})
    page = view(data)
    page.get_by_role("radio", name="sentence").check()
    texts = page.locator("#prompt > span").all_text_contents()
    assert texts == ["<s>", " p0 p1", " held", " p2", " p3", " p4 p5"]
    prompt(page, 0).click()
    assert having(page, "prompt", "chosen") == [0, 1]


def test_signs_are_readable_without_colour(view):
    data = sure(example())
    data["token_attr"][0] = [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    page = view(data)
    answer(page, 0).hover()
    lines = page.locator("#prompt .piece .ink").evaluate_all(
        "all => all.slice(0, 3).map(e => { const s = getComputedStyle(e);"
        " return s.textDecorationLine === 'none' ? 'none' : s.textDecorationStyle; })"
    )
    assert lines == ["solid", "dashed", "none"]
    values = page.locator("#top-prompt td.value").all_inner_texts()
    assert [value[0] for value in values[:2]] == ["+", "−"]


def test_attributions_within_their_error_are_pale(view):
    data = example()
    data["token_attr"][0] = [1.0, 1.0, -0.5, 0.0, 0.0, 0.0]
    data["token_attr_se"][0] = [0.1, 0.52, None, 0.0, 0.0, 0.0]
    page = view(data)
    answer(page, 0).hover()
    # Of the third, an estimate, no error is known.
    assert levels(page, "prompt")[:3] == pytest.approx([1.0, 0.3, -0.15], abs=0.0126)
    assert having(page, "prompt", "sure") == [0]
    assert page.locator("#top-prompt tbody tr.unsure .what").all_inner_texts() == ["p1", "p2"]
    assert page.locator("#top-prompt td.value").nth(2).inner_text().endswith("± ?")
    assert "± ?: of these estimates no error is known" in page.inner_text("#note")
    answer(page, 0).click()
    prompt(page, 1).hover()
    assert page.inner_text("#details").endswith("could be noise")


def test_multiple_comparison_threshold_is_used(view):
    data = example(marked_beyond=3.0)
    data["token_attr"][0] = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    data["token_attr_se"][0] = [0.3, 0.4, 0.0, 0.0, 0.0, 0.0]
    page = view(data)
    answer(page, 0).click()
    assert having(page, "prompt", "sure") == [0]
    assert "within 3.00 of them could be noise" in page.inner_text("#note")


def test_estimates_of_unknown_error_are_no_causes(view):
    data = example()
    for name in ("token_attr", "output_attr"):
        data[f"{name}_se"] = [[None] * len(row) for row in data[name]]
    page = view(data)
    assert page.inner_text("#about").endswith(
        "evaluations, of unknown error · log-probability in nats"
    )
    for look in (lambda: None, lambda: answer(page, 3).click()):
        look()
        captions = page.locator("#top-prompt caption").inner_text()
        assert captions == "In the prompt, by finest: largest estimates, of unknown error"
        assert "nothing tells a cause from noise" in page.inner_text("#note")
        assert not having(page, "prompt", "sure") + having(page, "answer", "sure")
        assert page.locator("#links path").count() == 0
        rows = page.locator("#top-prompt tbody tr:not(.rest)")
        assert rows.count() == page.locator("#top-prompt tbody tr.unsure").count() > 0
        shown = rows.locator("td.value").all_inner_texts()
        assert all(value.endswith("± ?") for value in shown)
    prompt(page, 1).hover()
    assert page.inner_text("#details").endswith("probable, of unknown error")
    # The same numbers where nothing is estimated are what they are.
    page = view(data | {"estimate": False})
    assert page.inner_text("#top-prompt caption") == "In the prompt, by finest"
    assert page.locator("#links path").count() > 0


def test_keyboard_reaches_every_function(view):
    page = view(example())
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id], body').id"))
    assert {"blocks", "prompt", "answer"} <= set(reached)
    answer(page, 0).focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#chosen-name") == "“t1”"
    page.keyboard.press("Enter")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == " t4"
    assert page.inner_text("#chosen-name") == "“t1”"
    assert answer(page, 1).get_attribute("aria-selected") == "true"
    page.keyboard.press("Escape")
    prompt(page, 0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert page.inner_text("#chosen-name") == "“p1”"


def test_aria_roles_and_names(view):
    data = example()
    data["output"][1]["text"] = "\n"
    page = view(data)
    assert page.get_by_role("listbox", name="Prompt").count() == 1
    assert page.get_by_role("listbox", name="Answer").count() == 1
    assert page.get_by_role("option", name="new line").count() == 1
    assert page.get_by_role("option", name="t0", exact=True).count() == 1
    page.click("#more summary")
    assert page.get_by_role("group", name="Full colour").get_by_role("radio").count() == 2
    for name in ("In the prompt, by finest", "In the answer so far, by token"):
        assert page.get_by_role("table", name=name).count() == 1
    assert page.get_by_role("columnheader", name="attribution").count() == 2


@pytest.fixture(scope="module")
def axe():
    """The rules of axe-core, as a script for a page."""
    package = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page, axe):
    """What axe-core finds wrong in what is shown, by the rules of WCAG 2.2 AA and its own."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document).then((result) => result.violations)")
    return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_passes_accessibility_audit(view, axe, scheme):
    data = sure(example(levels=LEVELS))
    data["token_attr"][2] = [1.0, -1.0, 0.5, -0.5, 1.0, -1.0]
    data["output_attr"][2][:2] = [1.0, -1.0]
    page = view(data)
    page.emulate_media(color_scheme=scheme)
    page.get_by_role("radio", name="finest").check()
    answer(page, 2).click()
    assert violations(page, axe) == []
    page.click("#more summary")
    page.check("input[value=absolute]")
    page.check("input[value=map]")
    assert violations(page, axe) == []


def test_markup_is_escaped_and_white_space_kept(view):
    data = example(len(HOSTILE), 3)
    for i, text in enumerate(HOSTILE):
        data["prompt"][i + 1]["text"] = data["input_tokens"][i] = text
    data["output"][1]["text"] = data["output_features"][1] = "\n\n   <b>bold</b>\n"
    page = view(data)
    for i in range(len(HOSTILE)):
        prompt(page, i).hover()
    answer(page, 1).click()
    drawn = page.evaluate("['prompt', 'answer'].map(id => document.getElementById(id).textContent)")
    assert drawn[0] == "<s>" + "".join(HOSTILE)
    assert drawn[1] == " t0\n\n   <b>bold</b>\n t2"
    assert page.evaluate(
        "[typeof window.hacked, document.querySelectorAll('b:not(.step b), img').length]"
    ) == ["undefined", 0]


def test_pieces_of_one_feature_are_highlighted_together(view):
    data = sure(example(2, 4))
    data["prompt"] = [
        {"text": " Palm", "feature": 0},
        {"text": " Coast", "feature": 0},
        {"text": " and", "feature": 1},
        {"text": " it", "feature": 0},
    ]
    data["output"] = [{"text": f" t{t}", "feature": t // 2} for t in range(4)]
    data["output_features"] = [" t0 t1", " t2 t3"]
    data["output_attr"] = [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]
    data["output_attr_se"] = [[0.0, 0.0]] * 4
    data["token_attr"] = [[0.5, -0.25]] * 4
    page = view(data)
    answer(page, 3).hover()
    assert page.locator("#prompt .piece").all_inner_texts() == [" Palm Coast", " and", " it"]
    assert levels(page, "prompt") == [1, -0.5, 1]
    assert levels(page, "answer") == [1, 1, 0, 0]


def test_fixed_answer_is_no_cause(view):
    data = sure(example(output_features=None, output_attr=None))
    data["output"] = [piece | {"feature": None} for piece in data["output"]]
    page = view(data)
    answer(page, 3).click()
    assert levels(page, "prompt") == scaled(data["token_attr"][3])
    assert levels(page, "answer") == [0] * 5
    answer(page, 1).hover()
    assert page.inner_text("#details") == "“t1” was held fixed"
    assert "asks which part of it the answer came from" in page.inner_text("#note")
    assert list(bridge(page)) == [
        "nothing given",
        "prompt",
        "not attributed",
        "everything given",
    ]


@pytest.mark.parametrize(("n_prompt", "n_target"), [(1, 1), (0, 2), (3, 0)])
def test_tiny_results_open(view, n_prompt, n_target):
    page = view(example(n_prompt, n_target))
    assert page.locator("#prompt .piece").count() == n_prompt
    assert page.locator("#answer .piece").count() == n_target


def chat():
    """A system and a user turn in a template, and an answer that ends in a special token."""
    data = sure(example(3, 3))
    said = [
        ("<|system|>\n", None, "template"),
        ("Be", None, "system"),
        (" brief.", 0, "system"),
        ("</s>\n<|user|>\n", None, "template"),
        ("Who", 1, "user"),
        (" is\nit?", 2, "user"),
        ("</s>\n<|assistant|>\n", None, "template"),
    ]
    data["prompt"] = [{"text": t, "feature": f, "role": role} for t, f, role in said]
    data["output"][2] |= {"text": "</s>", "role": "template"}
    return data


def test_long_template_text_is_folded_until_clicked(view):
    data = chat()
    data["prompt"][0]["text"] = "<|system|>\nYou are a helpful assistant.\nBe kind.\n"
    page = view(data)
    line = page.locator("#prompt .template").first
    height = line.bounding_box()["height"]
    assert line.text_content() == data["prompt"][0]["text"]
    line.click(force=True)  # an option that is none
    assert line.bounding_box()["height"] > 2 * height


def test_chat_turns_are_bubbles_with_grey_template(view, axe):
    page = view(chat())
    turns = page.locator("#prompt .turn")
    assert turns.evaluate_all("all => all.map(e => [e.dataset.role, e.textContent])") == [
        ["system", "Be brief."],
        ["user", "Who is\nit?"],
    ]
    names = [page.get_by_role("group", name=name, exact=True) for name in ("system", "user")]
    assert [name.count() for name in names] == [1, 1]
    assert page.locator("#answer .turn").all_text_contents() == [" t0 t1"]
    edges = turns.evaluate_all("all => all.map(e => [e.offsetLeft, e.offsetLeft + e.offsetWidth])")
    assert edges[1][0] > edges[0][0]  # the user's is at the other side
    grey, ink = (
        page.locator(one).first.evaluate("e => getComputedStyle(e).color")
        for one in (".template", ".turn .piece")
    )
    assert grey != ink
    template = page.locator("#prompt .template, #answer .template").all_text_contents()
    assert template == ["<|system|>\n", "</s>\n<|user|>\n", "</s>\n<|assistant|>\n", "</s>"]
    page.get_by_role("option", name="Who").click()
    assert having(page, "prompt", "chosen") == [1]
    assert violations(page, axe) == []


OUTPUT_LEVELS = [{"name": "word", "part_of": [0, 0, 1, 2, 2]}]


def test_answer_is_grouped_by_larger_units(view):
    data = sure(example(output_levels=OUTPUT_LEVELS))
    page = view(data)
    switch = page.get_by_role("group", name="Answer by")
    assert switch.locator("span").all_inner_texts() == ["word", "token"]
    answer(page, 4).click()
    switch.get_by_role("radio", name="word").check()
    assert page.locator("#answer .piece").all_text_contents() == [" t0 t1", " t2", " t3 t4"]
    assert page.inner_text("#chosen-name") == "“t3 t4”"
    of_prompt, of_output = added(data["token_attr"][3:]), added(data["output_attr"][3:])
    words = [of_output[0] + of_output[1], of_output[2], of_output[3] + of_output[4]]
    assert levels(page, "prompt") == scaled(of_prompt)
    assert levels(page, "answer") == scaled(words)
    prompt(page, 2).click()
    column = [row[2] for row in data["token_attr"]]
    words = [column[0] + column[1], column[2], column[3] + column[4]]
    assert levels(page, "answer") == scaled(words)


def test_output_level_of_the_data_is_shown_first(view):
    page = view(example(output_levels=OUTPUT_LEVELS, answer_unit="word"))
    assert page.locator("#answer .piece").all_text_contents() == [" t0 t1", " t2", " t3 t4"]


def test_pinned_word_can_be_widened_to_its_sentence(view):
    said = [{"name": "sentence", "part_of": [0, 0, 0, 1, 1]}]
    data = sure(example(levels=LEVELS, output_levels=said))
    page = view(data)
    answer(page, 1).click()
    page.click("#sentence")
    assert page.inner_text("#chosen-name") == "“t0 t1 t2”"
    assert not page.locator("#sentence").is_visible()
    sums = at_level(added(data["token_attr"][:3]), LEVELS[1])
    ranked = sorted(range(3), key=lambda i: -abs(sums[i]))
    rows = page.locator("#top-prompt tbody tr")
    assert rows.locator(".what").all_inner_texts() == [LEVELS[1]["parts"][i] for i in ranked]
    # Or by one click, where the answer is read by sentences.
    page.get_by_role("group", name="Answer by").get_by_role("radio", name="sentence").check()
    page.keyboard.press("Escape")
    answer(page, 1).click()
    assert page.inner_text("#chosen-name") == "“t3 t4”"


def test_token_fragments_are_shown_within_their_word(view):
    around = {"prompt": [["", ""]] * 6, "output": [["", ""], ["c", "o"], *[["", ""]] * 3]}
    page = view(sure(example(around=around)))
    cell = page.locator("#top-answer tbody tr:has(.where:text-is('#2')) .what button")
    assert cell.inner_html() == (
        '<span class="around">c</span><b>t1</b><span class="around">o</span>'
    )


def test_heat_map_has_every_marked_cell(view):
    data = sure(example())
    data["token_attr_se"][2][0] = 99.0
    page = view(data)
    page.check("input[value=map]")
    assert not page.locator("#prompt").is_visible()
    page.evaluate("document.querySelector('#map canvas').scrollIntoView()")
    colours = page.evaluate(
        """([left, top, width, height]) => {
          const canvas = document.querySelector("#map canvas"), scale = devicePixelRatio;
          const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return [[0, 0], [2, 0], [2, 1]].map(([row, column]) => {
            const x = Math.round((left + width * (column + 0.2)) * scale);
            const y = Math.round((top + height * (row + 0.2)) * scale);
            return image.data[4 * (y * image.width + x) + 3];
          });
        }""",
        [150, 130, 28, 18],
    )
    # Of the second cell the error is too large.
    assert [alpha > 0 for alpha in colours] == [True, False, True]
    box = page.locator("#map canvas").bounding_box()
    page.mouse.move(box["x"] + 150 + 28 * 1.5, box["y"] + 130 + 18 * 2.5)
    assert page.inner_text("#details").startswith("“p1” → “t2”: ")
    page.mouse.click(box["x"] + 150 + 28 * 1.5, box["y"] + 130 + 18 * 2.5)
    assert page.inner_text("#chosen-name") == "“t2”"


def test_tooltip_covers_no_text(view):
    data = sure(example(120, 60))
    page = view(data)
    page.set_viewport_size({"width": 1100, "height": 600})
    covered = page.evaluate(
        """() => Array.from(document.querySelectorAll("#text .piece .ink"), (ink) => {
          const box = ink.getBoundingClientRect();
          const seen = box.bottom < innerHeight && box.top > 0;
          const top = seen && document.elementFromPoint(box.left + 2, (box.top + box.bottom) / 2);
          return top && !ink.contains(top) && !top.closest(".box") ? top.outerHTML : null;
        }).filter(Boolean)"""
    )
    page.set_viewport_size({"width": 1280, "height": 720})
    assert covered == []


def test_print_view_is_complete_without_links(view):
    data = sure(example(narrative=["It was so."], about=["model", "method"]))
    page = view(data)
    page.emulate_media(media="print")
    assert not page.locator("#links").is_visible()
    assert "Solid lines" not in page.inner_text("#note")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#provenance dt").first.is_visible()
    assert page.inner_text("#about") == "model · method"
    assert page.inner_text("#narrative") == "It was so."
    assert page.locator("#answer").evaluate("e => e.scrollHeight <= e.clientHeight + 1")
    page.emulate_media(media="screen")


def test_links_start_at_the_strongest_causes_and_can_be_hidden(view):
    data = sure(example())
    data["token_attr"][3] = [4.0, -2.0, 0.1, 0.0, 0.0, 0.0]
    data["output_attr"][3][1:3] = [1.0, 0.0]
    data["output_attr"][3][0] = 0.0
    page = view(data)
    answer(page, 3).hover()
    drawn = page.locator("#links path").evaluate_all(
        "all => all.map(e => [e.dataset.link, e.getAttribute('class')])"
    )
    assert drawn == [["prompt 0 3", "up"], ["prompt 1 3", "down"], ["answer 1 3", "up"]]
    page.click("#more summary")
    page.get_by_role("checkbox", name="lines").uncheck()
    answer(page, 3).hover()
    assert page.locator("#links path").count() == 0


def test_pinned_token_shows_its_effects(view):
    data = sure(example())
    for t, value in [(2, 0.5), (3, -2.0), (4, 1.0)]:
        data["output_attr"][t][1] = value
    page = view(data)
    answer(page, 1).click()
    rows = page.locator("#effects tbody tr")
    assert rows.locator(".what").all_inner_texts() == ["t3", "t4", "t2"]
    values = [v.split(" ")[0] for v in rows.locator(".value").all_inner_texts()]
    assert [number(v) for v in values] == [-2.0, 1.0, 0.5]
    answer(page, 4).click()  # the last one leads to nothing
    assert not page.locator("#effects").is_visible()


def test_causes_are_text_without_javascript(tab):
    data = sure(example(about=["tiny", "KernelShap"], narrative=["Mostly p2."]))
    data["token_attr"][1] = [0.0, 0.0, 7.5, 0.0, -6.25, 0.0]
    data["token_attr_se"][1][2] = 0.5
    data["token_attr_se"][2] = [99.0] * 6
    context = tab.context.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_content(html.page(data))
    rows = page.locator("noscript tbody tr")
    cells = rows.nth(1).locator("th, td").all_inner_texts()
    noise = rows.nth(2).locator("td").first.inner_text()
    kinds = rows.nth(1).locator("td .cause").evaluate_all("all => all.map(e => e.className)")
    answers = page.locator("noscript pre").nth(1).inner_text().split()
    told = page.inner_text("body")
    context.close()
    assert answers == ["t0", "t1", "t2", "t3", "t4"]
    assert cells[0].strip() == "t1"
    assert cells[1] == "p2 +7.50 ± 0.50, p4 −6.25 ± <0.01"
    assert cells[2].startswith("t0 ")
    assert kinds[:2] == ["cause raises", "cause lowers"]
    assert noise == "–"  # told from nothing: left out
    for said in ("tiny · KernelShap", "Mostly p2.", "How this was computed", "seed"):
        assert said in told


@pytest.mark.parametrize("floor", [3e-5, 0.2])
def test_noise_floor_is_mentioned_where_digits_show_it(view, floor):
    page = view(sure(example(noise_floor=floor)))
    answer(page, 3).click()
    assert ("noise of the model's own" in page.inner_text("#note")) == (floor > 0.1)


def test_unresolved_or_noisy_features_say_so(view):
    data = sure(example(unresolved=[[0, 1, 6]], noise_floor=0.2))
    data["token_attr"][3] = [1.0, 1.0, 0.1, 0.0, 0.0, 0.0]
    page = view(data)
    answer(page, 3).click()
    prompt(page, 1).hover()
    assert page.inner_text("#details").endswith(
        "shared evenly by 3 features that were not told apart"
    )
    prompt(page, 2).hover()
    assert page.inner_text("#details").endswith("below the model's noise")
    assert having(page, "prompt", "sure") == [0, 1]
    assert "3 features were not told apart" in page.inner_text("#note")


def test_arrow_keys_follow_right_to_left_text(view):
    data = example(2, 2)
    for i, text in enumerate(["مرحبا", " بك"]):
        data["prompt"][i + 1]["text"] = data["input_tokens"][i] = text
    page = view(data)  # the prompt begins with "<s>", which does not turn it
    assert page.locator("#prompt").evaluate("e => getComputedStyle(e).direction") == "rtl"
    prompt(page, 0).focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.textContent") == " بك"


def contrast(**changes):
    """A contrast, with log-probabilities beside it."""
    data, other = example(seed=1), example(seed=2)
    names = "token_attr token_attr_se output_attr output_attr_se full_values empty_values".split()
    beside = {name: other[name] for name in names} | {"attr_target": "log_prob", "sums": []}
    foils = [["Oslo", "Rome", "<b>", "Madrid", "Bonn", "Nice"], [], ["a"], ["b"], ["c"]]
    return data | {"attr_target": "contrast", "foils": foils, "other": beside} | changes


def test_value_switch(view):
    data = contrast()
    page = view(data)
    labels = page.locator("#values label")
    assert labels.all_text_contents() == ["contrast", "log-probability"]
    answer(page, 3).click()
    for number, numbers in ((0, data), (1, data["other"]), (0, data)):
        labels.nth(number).click()
        shown = numbers["token_attr"][3]
        most = max(map(abs, shown))
        drawn = levels(page, "prompt")
        strong = [i for i, x in enumerate(shown) if abs(x) > 0.1 * most]
        assert [drawn[i] for i in strong] == scaled([shown[i] for i in strong], most)
        assert f"{numbers['full_values'][3]:.2f}".replace("-", "−") in page.inner_text("#bridge")
        is_contrast = number == 0
        assert ("rather than “b”" in page.inner_text("#details")) == is_contrast
        assert ("rather than its foils" in page.inner_text("#about")) == is_contrast
        assert ("A contrast: " in page.inner_text("#note")) == is_contrast
    assert having(page, "answer", "chosen") == [3]


def test_foils_are_shown_on_hover_and_pin(view):
    page = view(contrast())
    answer(page, 0).hover()
    assert page.inner_text("#chosen-place") == (
        "token 1 of 5, rather than “Oslo”, “Rome”, “<b>”, “Madrid”, “Bonn”…"
    )
    assert " : " in page.inner_text("#details")  # as odds
    answer(page, 1).hover()
    assert "rather than" not in page.inner_text("#details")
    page.mouse.move(1, 1)
    assert "rather than" not in page.inner_text("#chosen-place")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"foils": [[]]}, "`foils` has 1 entries for 5 tokens"),
        ({"other": {"token_attr": [[0.0]] * 5}}, "`token_attr` has"),
        ({"other": {"full_values": [0.0]}}, "`full_values` has 1 entries"),
    ],
)
def test_second_value_is_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        html.page(contrast(**changes))


def test_whole_answer_errors_are_those_given(view):
    whole = [
        {"side": "prompt", "level": None, "spans": [[0, 5]], "se": [[0.5] * 6]},
        {"side": "answer", "level": None, "spans": [[0, 5]], "se": [[0.25] * 5]},
    ]
    data = example(sums=whole)
    page = view(data)
    errors = page.locator(".causes td.value small").all_inner_texts()
    assert {error.split()[-1] for error in errors} <= {
        "0.5",
        "0.50",
        "0.500",
        "0.3",
        "0.25",
        "0.250",
    }
    assert "independent" not in page.inner_text("#note")
    whole[1]["se"] = [[0.5]]
    with pytest.raises(ValueError, match="answer by its finest parts has 1 rows"):
        html.page(data)
    whole[1] = {"side": "prompt", "level": "verse", "spans": [], "se": []}
    assert html.page(data)  # says nothing


def test_known_errors_of_parts_and_spans_are_shown(view):
    spans = [[t, t + 1] for t in range(5)] + [[1, 3]]
    told = [
        {"side": "prompt", "level": "sentence", "spans": spans, "se": [[0.125, 9.0, 9.0]] * 6},
        {"side": "prompt", "level": None, "spans": [[1, 3]], "se": [[0.0625] * 6]},
        {"side": "answer", "level": None, "spans": [[1, 3]], "se": [[0.03125] * 5]},
    ]
    data = example(levels=LEVELS, sums=told)
    data["token_attr"][1], data["token_attr"][2] = [3.0] * 6, [3.0] * 6
    page = view(data)
    page.get_by_role("radio", name="finest").check()
    answer(page, 1).click()
    answer(page, 2).click(modifiers=["Shift"])
    prompt(page, 0).hover()
    assert page.inner_text("#details").endswith("+6.00 ± 0.06 nats")
    assert "approximate" not in page.inner_text("#note")
    page.get_by_role("radio", name="sentence").check()
    prompt(page, 0).hover()
    assert page.inner_text("#details").endswith("+18.0 ± 0.1 nats")
    prompt(page, 2).hover()
    assert page.inner_text("#details").endswith("± 9.0 nats, could be noise")
    assert "approximate" not in page.inner_text("#note")
    page.keyboard.press("Escape")
    prompt(page, 0).click()  # what it did to each token
    answer(page, 2).hover()
    assert "+9.00 ± 0.13 nats = " in page.inner_text("#details")
    assert "approximate" not in page.inner_text("#note")


def test_large_results_have_few_elements_and_a_ruler(view):
    data = example(600, 120)
    page = view(data)
    assert page.locator("*").count() < 4 * (600 + 120) + 300  # 72,000 cells
    assert page.locator("#prompt + .ruler").is_visible()
    answer(page, 5).click()
    row = data["token_attr"][5]
    best = max(range(600), key=lambda j: abs(row[j]))
    page.click("#top-prompt tbody tr button >> nth=0")
    assert page.evaluate(
        """(j) => { const box = document.getElementById("prompt").getBoundingClientRect();
        const piece = document.querySelectorAll("#prompt .piece")[j].getBoundingClientRect();
        return piece.top >= box.top && piece.bottom <= box.bottom; }""",
        best,
    )


def test_fragments_on_one_page_are_independent(view):
    first, second = example(seed=1), example(seed=2)
    frames = html.fragment(first) + html.fragment(second)
    page = view.text(f"<!DOCTYPE html><h1>Notebook</h1>{frames}")
    weight = page.evaluate("getComputedStyle(document.querySelector('h1')).fontSize")
    one, two = page.frame_locator("iframe").first, page.frame_locator("iframe").last
    one.locator("#answer .piece").nth(2).click()
    two.locator("#chosen-name").wait_for()
    assert one.locator("#chosen-name").inner_text() == "“t2”"
    assert two.locator("#chosen-name").inner_text() == "Whole answer"
    assert weight == "32px"  # the browser's own size: the page's style has not leaked
    heights = page.locator("iframe").evaluate_all(
        "all => all.map(f => [f.clientHeight, f.contentDocument.documentElement.scrollHeight])"
    )
    assert all(inner <= outer for outer, inner in heights)


def test_iframe_holds_the_escaped_page():
    data = example()
    assert html.page(data) == escapes.unescape(
        html.fragment(data).split('srcdoc="')[1][: -len('"></iframe>')]
    )


def test_fragment_has_fallback_text():
    beside = html.fragment(example(), "t1  ←  p2 +1.00 <b>").split("</iframe>")[1]
    assert "<pre>t1  ←  p2 +1.00 &lt;b&gt;</pre>" in beside
    cause = {"name": "p2", "text": "p2", "attribution": -1.0, "standard_error": 0.1, "marked": True}
    data = example(summary={"level": "word", "prompt": [cause], "answer": []})
    beside = html.fragment(data, "text").split("</iframe>")[1]
    assert "whole answer, direct effects</b> ← " in beside.split("</summary>")[0]
    assert "−1.00" in beside.split("</summary>")[0]


def test_newline_marks_are_shown_in_features_only(view):
    prompt = [
        {"text": "one", "feature": 0},
        {"text": "\n\n", "feature": None},
        {"text": "two", "feature": 1},
        {"text": "\n", "feature": 2},
    ]
    page = view(example(n_prompt=3, prompt=prompt, input_tokens=["one", "two", "\n"]))
    assert page.locator("#prompt .newline").count() == 1
    assert page.locator("#prompt .piece .newline").count() == 1


def test_template_is_left_to_right_beside_right_to_left_text(view):
    prompt = [
        {"text": "<|user|>", "feature": None, "role": "template"},
        {"text": "أين تعيش", "feature": 0, "role": "user"},
        {"text": " سارة", "feature": 1, "role": "user"},
    ]
    page = view(example(n_prompt=2, prompt=prompt, input_tokens=["أين تعيش", " سارة"]))
    assert page.locator("#prompt").get_attribute("dir") == "rtl"
    template = page.locator("#prompt .template").first
    told = template.evaluate(
        "e => [getComputedStyle(e).direction, getComputedStyle(e).unicodeBidi]"
    )
    assert told == ["ltr", "isolate"]


def test_panel_shows_long_names_completely(view):
    name = "How deep is Lake Baikal?"
    names = [name, *(f" p{i}" for i in range(1, 6))]
    pieces = [{"text": own, "feature": i} for i, own in enumerate(names)]
    page = view(example(prompt=pieces, input_tokens=names))
    button = page.locator(f"#top-prompt button[title='{name}']")
    assert button.evaluate(
        "e => e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight"
    )


def test_provenance_section_is_in_words():
    noted = {
        "generation": {"eos_token_id": "2", "max_new_tokens": "28", "do_sample": "False"},
        "probe": {"dtype": "float32", "n_before": 0, "sees_ahead": False, "packs_rows": True},
    }
    told = dict(provenance_rows({"provenance": noted}))
    assert told["how the answer was generated"] == (
        "until the token with number 2, at most 28 tokens, the likeliest token each time"
    )
    assert told["what the model was found to do"] == (
        "float32, sees nothing of what follows a token, several texts in one row are exact"
    )
