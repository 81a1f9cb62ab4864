"""Pages are read back: what stands in them is what the figures say, and nothing comes from outside."""

from __future__ import annotations

import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_folders import FIGURES

from reason.cli.inspect import inspect
from reason.errors import ConfigError
from reason.methods.figures import HeatMap, Lines, Table, Tokens, Tree
from reason.printable import printable
from reason.reports import formatting, svg
from reason.reports.html import STEPS, about, check_page, page
from reason.reports.svg import chart
from reason.reports.terminal import _shade

VOID = {"meta", "path", "br"}  # path: closes itself in SVG
NASTY = (
    '<script>alert("1")</script> & <b class=\'x\'> "" &amp; 日本語 العربية \u202e {x} $1 [y] %s </td></table>'
)


class Node:
    def __init__(self, tag: str, attributes: dict[str, str | None], above: Node | None):
        self.tag, self.attributes, self.above = tag, attributes, above
        self.inside: list[Node | str] = []

    def all(self, tag: str = "", kind: str = "") -> list[Node]:
        """Every node below of this tag and class, in order."""
        found = []
        for node in self.inside:
            if isinstance(node, Node):
                if tag in ("", node.tag) and (not kind or kind in node["class"].split()):
                    found.append(node)
                found += node.all(tag, kind)
        return found

    def __getitem__(self, name: str) -> str:
        return self.attributes.get(name) or ""

    @property
    def text(self) -> str:
        return "".join(node if isinstance(node, str) else node.text for node in self.inside)


class Reader(HTMLParser):
    """A strict reader: every element is closed in its place, no attribute twice."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.top = self.here = Node("", {}, None)
        self.feed(text)
        self.close()
        assert self.here is self.top, f"<{self.here.tag}> is not closed"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        node = Node(tag, dict(attrs), self.here)
        self.here.inside.append(node)
        if tag not in VOID:
            self.here = node

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert tag == self.here.tag, f"</{tag}> closes <{self.here.tag}>"
            assert self.here.above is not None
            self.here = self.here.above

    def handle_data(self, data):
        self.here.inside.append(data)


def read(*figures, **keys) -> Node:
    return Reader(page(figures, **{"title": "Page", "facts": {"run": "r"}, **keys})).top


def cells(table: Node) -> list[list[str]]:
    return [[c.text for c in row.inside if isinstance(c, Node)] for row in table.all("tr")]


def places(d: str) -> list[tuple[float, float]]:
    """The absolute points of a path."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", d)]


# --- the page as a whole ------------------------------------------------------------------------


def test_every_kind_is_there_and_nothing_comes_from_outside():
    text = page(FIGURES, title="One user", facts={"run": "latent-1", "dataset": "ml"}, saying="A remark.")
    top = Reader(text).top
    assert text.startswith("<!doctype html>") and top.all("html")[0]["lang"] == "en"
    assert top.all("title")[0].text == "One user" and "A remark." in top.all("header")[0].text
    assert {m["name"] for m in top.all("meta")} >= {"viewport", "color-scheme"}
    assert [d.text for d in top.all("dd")] == ["latent-1", "ml"]
    sections = top.all("section")
    assert [s.all("h2")[0].text for s in sections] == [f.title for f in FIGURES]
    assert all(f.note in s.text for f, s in zip(FIGURES, sections, strict=True))

    tags = {n.tag for n in top.all()}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    attributes = {a for n in top.all() for a in n.attributes}
    assert "src" not in attributes and not any(a.startswith("on") or a == "style" for a in attributes)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?:|//", text)


def test_ids_are_unique_and_links_lead_somewhere():
    top = read(*FIGURES, *FIGURES)
    ids = [n["id"] for n in top.all() if "id" in n.attributes]
    assert len(ids) == len(set(ids)) == 2 * 2 * len(FIGURES)
    links = [a["href"] for a in top.all("a")]
    assert len(links) == 2 * len(FIGURES) and {a[1:] for a in links} <= set(ids)
    assert {n["aria-labelledby"] for n in top.all()} - {""} <= set(ids)
    assert not read(*FIGURES[:3]).all("nav")  # three sections need no contents


def test_the_same_figures_give_the_same_page():
    assert page(FIGURES, title="a", facts={}) == page(FIGURES, title="a", facts={})


def test_text_is_text_wherever_it_stands():
    n = NASTY
    figures = (
        Table(n, [n, "b"], [[n, 1.0], ["", n]], n),
        Lines(n, [0, 1], {n: [0.0, 1.0]}, n, n, n),
        HeatMap(n, [[0.0, 1.0]], [n], [n, n * 3], n),
        Tokens(n, [n, "x"], [0.0, 1.0], 0, 1, n, n),
        Tree(n, [-1, 0], [n, n], [0.5, None], [1, 0], [n, n], 0, 1, n, n),
    )
    top = read(*figures, title=n, facts={n: n}, saying=n)
    n = printable(n)
    plain = read(*FIGURES)
    assert {t.tag for t in top.all()} == {t.tag for t in plain.all()}  # no element of the text's own making
    assert top.all("title")[0].text == top.all("h1")[0].text == top.all("dt")[0].text == n
    table, lines, heat, tokens, tree = top.all("section")
    assert cells(table) == [[n, "b"], [n, "1.000"], ["", n]]
    assert lines.all("li")[0].text == n and cells(lines)[0] == [n, n]
    assert [p.text for p in lines.all("p", "axis")] == [n, n] and n in lines.all("div")[1]["aria-label"]
    assert [row[0] for row in cells(heat)] == ["", n, n * 3] and cells(heat)[0][1] == n
    assert [span["title"] for span in heat.all("tbody")[0].all("span")] == [n, n * 3]
    assert tokens.all("div", "tokens")[0].text == n + "x" and n in tokens.all("p", "scale")[0].text
    assert [t.text for t in tree.all("title")] == [f"{n} (0.5)", n] and cells(tree)[1][2:] == [
        n,
        "0.5000",
        "1",
        n,
    ]
    assert [t.text for t in tree.all("text", "sign")] == [n, n] and all(
        t.text == svg.clipped(n) for t in tree.all("text", "label")
    )


def test_what_a_page_may_not_hold_is_spelled_out():
    text = page([Tokens("t", ["a\x00b\x1b[31m\ud800c\n"], [1.0])], title="\udcff", facts={})
    assert Reader(text).top.all("div", "tokens")[0].text == r"a\x00b\x1b[31m\ud800c" + "\n"
    text.encode("utf-8")


# --- the kinds ----------------------------------------------------------------------------------


def test_numbers_of_a_table_are_read_back():
    rng = np.random.default_rng(0)
    rows = [
        [f"item {i}", i, float(a), float(b), float(c), f"{d:.1%}"]
        for i, (a, b, c, d) in enumerate(
            zip(rng.normal(size=30), 10.0 ** rng.uniform(-9, 6, 30), 1e4 * rng.normal(size=30), rng.random(30), strict=True)
        )
    ]  # fmt: skip
    table = read(Table("T", ["item", "n", "near", "far", "large", "share"], rows)).all("table")[0]
    for row, told in zip(rows, cells(table)[1:], strict=True):
        assert told[:2] == [row[0], str(row[1])] and told[5] == row[5]
        assert abs(float(told[2]) - row[2]) <= 0.0005  # one column, one number of decimals
        assert abs(float(told[3].replace(",", "")) - row[3]) <= max(0.5, 6e-4 * row[3])
        assert abs(float(told[4].replace(",", "")) - row[4]) <= 0.5
    assert len({len(told[2].partition(".")[2]) for told in cells(table)[1:]}) == 1
    assert [th["class"] for th in table.all("th")[:6]] == ["", "n", "n", "n", "n", "n"]
    assert {th["scope"] for th in table.all("th")} == {"col", "row"}


def test_small_numbers_in_a_column_are_never_rounded_away():
    told = cells(read(Table("T", ["a", "b"], [["x", 9.0], ["y", 0.0001], ["z", 0.0]])))[1:]
    assert [float(b) for _, b in told] == [9.0, 0.0001, 0.0]


def test_absent_odd_and_no_numbers():
    top = read(
        Table("T", ["a", "b"], [["x", None], ["y", math.nan], ["z", -math.inf]]), Table("E", ["a"], [])
    )
    assert [b for _, b in cells(top.all("table")[0])[1:]] == ["", "nan", "-inf"]
    assert "no data" in top.all("section")[1].text and not top.all("section")[1].all("table")


def colour(node: Node) -> int:
    (shade,) = (c for c in node["class"].split() if re.fullmatch(r"h\d+", c))
    return int(shade[1:])


def test_heat_map_has_number_label_and_shade():
    values = np.random.default_rng(1).normal(size=(5, 4))
    f = HeatMap("H", values.tolist(), [f"row {i}" for i in range(5)], [f"c{i}" for i in range(4)])
    table = read(f).all("table")[0]
    told = cells(table)
    assert told[0][1:] == f.columns and [row[0] for row in told[1:]] == f.rows
    np.testing.assert_allclose([[float(v) for v in row[1:]] for row in told[1:]], values, atol=0.0051)
    shades = np.array([colour(td) for td in table.all("tbody")[0].all("td")]).reshape(5, 4)
    share = (values - values.min()) / (values.max() - values.min())
    np.testing.assert_allclose(shades / (STEPS - 1), share, atol=0.51 / (STEPS - 1))


def test_a_wide_low_heat_map_is_turned_over_and_a_wide_high_one_gets_steep_labels():
    values = np.arange(80.0).reshape(2, 40)
    names = [f"a film with a long title, {i}" for i in range(40)]
    table = read(HeatMap("H", values.tolist(), ["step 1", "step 2"], names)).all("table")[0]
    told = cells(table)
    assert told[0] == ["", "step 1", "step 2"] and [row[0] for row in told[1:]] == names
    np.testing.assert_allclose([[float(v) for v in row[1:]] for row in told[1:]], values.T)
    high = read(HeatMap("H", [[0.5] * 40] * 50, [str(i) for i in range(50)], names)).all("table")[0]
    assert "steep" in high["class"] and high.all("thead")[0].all("span")[3]["title"] == names[3]


def test_heat_maps_without_cells_or_range_or_number():
    top = read(HeatMap("E", [], [], []), HeatMap("F", [[2.0]], ["a"], ["b"]), HeatMap("N", [[math.nan, 1.0]], ["a"], ["b", "c"]))  # fmt: skip
    empty, flat, odd = top.all("section")
    assert "no data" in empty.text and cells(flat)[1] == ["a", "2.00"]
    assert cells(odd)[1] == ["a", "nan", "1.00"] and odd.all("tbody")[0].all("td")[0]["class"] == ""


def test_shades_are_the_terminals_and_legible_in_both_settings():
    for i in range(STEPS):
        back, ink = formatting.shade(i / (STEPS - 1))
        there = _shade(i / (STEPS - 1)).bgcolor
        assert there is not None and there.triplet is not None and there.triplet.hex == back
        assert contrast(back, ink) >= 4.5
        assert f".h{i}{{background:{back};color:{ink};fill:{back}}}" in page([], title="", facts={})
    sheets = re.findall(r":root\{(.*?)\}", page([], title="", facts={}), re.S)
    assert len(sheets) == 3  # light, dark, print
    for sheet in sheets:
        colours = {k: full(v) for k, v in re.findall(r"--(\w+):(#\w+)", sheet)}
        assert all(contrast(colours[k], colours["paper"]) >= 4.5 for k in ("ink", "soft", "link"))
        assert all(contrast(colours[k], colours["band"]) >= 4.5 for k in ("ink", "soft"))
        assert all(contrast(colours[f"c{i}"], colours["paper"]) >= 3 for i in range(6))


def full(colour: str) -> str:
    return colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])


def contrast(a: str, b: str) -> float:
    """Of two colours, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        share = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(full(a)), luminance(full(b))))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scale", [1e-7, 0.02, 1.0, 350.0, 4e6])
def test_curves_pass_through_their_points(scale):
    """Values are recovered from the drawing with the help of its own ticks."""
    x = [0.0, 1.0, 2.0, 5.0, 6.0]
    series = {
        "a": [scale * v for v in (0.1, -0.5, 2.0, 0.3, 1.0)],
        "b": [scale, None, scale * 0.2, math.nan, 0.0],
    }
    section = read(Lines("L", x, series, "step", "value")).all("section")[0]
    svg = section.all("div")[1].all("svg")[0]
    up = [
        (float(t.text.replace(",", "")), float(t["y"])) for t in svg.all("text") if t["text-anchor"] == "end"
    ]
    across = [(float(t.text), float(t["x"])) for t in svg.all("text") if t["text-anchor"] == "middle"]
    assert len(up) >= 3 and len(across) >= 3
    assert all(-1 <= at <= 320 for _, at in up) and all(0 <= at <= 640 for _, at in across)
    to_y = np.polyfit([at for _, at in up], [v for v, _ in up], 1)
    to_x = np.polyfit([at for _, at in across], [v for v, _ in across], 1)
    for kind in ("curve", "mark"):
        for drawn, ys in zip(svg.all("path", kind), series.values(), strict=True):
            known = [(a, b) for a, b in zip(x, ys, strict=True) if b is not None and math.isfinite(b)]
            at = np.array(places(drawn["d"]))
            np.testing.assert_allclose(np.polyval(to_x, at[:, 0]), [a for a, _ in known], atol=0.01)
            np.testing.assert_allclose(np.polyval(to_y, at[:, 1]), [b for _, b in known], atol=0.005 * scale)
    assert [d["d"].count("M") for d in svg.all("path", "curve")] == [1, 3]  # a gap is not joined
    assert [li.text.strip() for li in section.all("li")] == ["a", "b"]
    told = cells(section.all("details")[0])
    assert told[0] == ["step", "a", "b"] and [row[0] for row in told[1:]] == ["0", "1", "2", "5", "6"]
    np.testing.assert_allclose(
        [float(row[1].replace(",", "")) for row in told[1:]], series["a"], atol=0.001 * scale
    )


def test_curves_with_one_point_none_and_many():
    assert chart([0, 1], [[None, math.nan]]) == "" and "no data" in read(Lines("L", [], {})).text
    one = Reader(chart([1000], [[3]])).top
    (at,) = places(one.all("path", "curve")[0]["d"])
    assert {t.text for t in one.all("text")} >= {"999", "1,000", "1,001"} and 200 < at[0] < 440
    many = Reader(chart(list(range(500)), [[i % 7 for i in range(500)]])).top
    assert not many.all("path", "mark") and "fine" in many.all("path", "curve")[0]["class"]
    looks = [p["class"] for p in Reader(chart([0, 1], [[i, i] for i in range(18)])).top.all("path", "curve")]
    assert len(set(looks)) == 18


def test_tokens_keep_their_text_and_say_their_numbers():
    tokens = ["\n\n  the", " cat", "\t[sat]\n", " <b>", "!", " x"]
    values = [1.0, 2.0, 2.0, 2.5, math.nan, 9.0]
    section = read(Tokens("T", tokens, values, 1, 3, "recursions")).all("section")[0]
    runs = section.all("i")
    assert section.all("div", "tokens")[0].text == "".join(tokens)
    assert [(r.text, r["title"]) for r in runs] == [
        ("\n\n  the", "1"), (" cat\t[sat]\n", "2"), (" <b>", "2.50"), ("!", "nan"), (" x", "9"),
    ]  # fmt: skip
    assert [colour(r) for r in runs if r["class"] != "none"] == [0, 16, 24, 32]
    assert section.all("p", "scale")[0].text == "13 recursions"


def test_many_tokens_stay_light():
    rng = np.random.default_rng(2)
    tokens = [f" w{i}" for i in rng.integers(0, 999, 20_000)]
    bare = len(page([Tokens("T", [], [])], title="", facts={})) + sum(map(len, tokens))
    continuous = page([Tokens("T", tokens, rng.random(20_000).tolist())], title="", facts={})
    assert len(continuous) - bare < 20_000 * 32
    depths = page(
        [Tokens("T", tokens, np.sort(rng.integers(1, 5, 20_000)).tolist(), 1, 4)], title="", facts={}
    )
    assert depths.count("<i ") == 4


# --- the verb -----------------------------------------------------------------------------------


def test_the_head_says_what_it_is_about(make):
    run = make.run()
    told = about(run.result, "user-7")
    assert told["title"] == "User user-7: latent on movielens-100k"
    facts = told["facts"]
    assert facts["run"] == run.name and facts["user"] == "user-7" and facts["dataset"] == "movielens-100k"
    assert facts["method"] == "latent with sasrec" and facts["depth"] == "2 latent steps, trained at depth 2"
    assert (
        facts["NDCG@10"].startswith(f"{run.result.accuracy.value:.4f} [") and "300 users" in facts["NDCG@10"]
    )
    assert told["saying"].startswith("NDCG@10: 1 if the target is ranked first")
    base = about(make.run(depths=(0,), train_depth=0).result)
    assert base["title"].startswith("One user") and base["facts"]["depth"] == "0 latent steps, the base"


@pytest.mark.parametrize(
    ("path", "said"),
    [("page.txt", "has the wrong extension for the page.\n.*: page.html"), ("page", "page.html"), (".", "is a folder"), ("taken.html", "is a folder"),
     ("absent/page.html", "no folder absent"), ("", "is a folder")],
)  # fmt: skip
def test_paths_that_no_page_can_be_written_to(path, said):
    Path("taken.html").mkdir()
    with pytest.raises(ConfigError, match=said):
        check_page(Path(path))
    with pytest.raises(ConfigError, match=said):  # before the run is even looked for
        inspect("no-such-run", html=Path(path))


def test_a_picture_is_refused_as_early():
    with pytest.raises(ConfigError, match="has the wrong extension for the image"):
        inspect("no-such-run", plot=Path("picture.txt"))


@pytest.mark.parametrize("name", ["page.html", "page.HTM"])
def test_paths_that_are_fine(name):
    check_page(Path(name))
    Path(name).write_text("an older page")
    check_page(Path(name))


def test_inspect_writes_a_page(tiny, template, tmp_path, capsys):
    import reason

    shutil.copy(template, tmp_path / "mlflow.db")
    folder = reason.run("latent", dict(word.split("=") for word in tiny))
    capsys.readouterr()
    inspect(folder.name, html=Path("user.html"))
    said = capsys.readouterr()
    assert "Page: user.html" in said.err and "page" not in said.out
    top = Reader(Path("user.html").read_text(encoding="utf-8")).top
    titles = [h.text for h in top.all("h2")]
    assert folder.name in [d.text for d in top.all("dd")] and len(titles) >= 4
    assert all(title in said.out for title in titles)


# --- trees --------------------------------------------------------------------------------------


def family(seed: int, nodes: int = 60) -> Tree:
    rng = np.random.default_rng(seed)
    parents = [-1, *(int(rng.integers(-1 if i % 20 == 19 else 0, i)) for i in range(1, nodes))]
    counts = [int(c) for c in rng.integers(0, 4, nodes)]
    values = [None if c == 3 else float(v) for c, v in zip(counts, rng.random(nodes), strict=True)]
    marks = ["mark" if rng.random() < 0.3 else "" for _ in parents]
    return Tree("T", parents, [f"node {i}" for i in range(nodes)], values, counts, marks, legend="reward")


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_has_a_place_of_its_own_for_every_node(seed):
    f = family(seed)
    at = svg.places(f)
    assert len(set(at)) == len(at)
    leaves = set(range(len(at))) - set(f.parents)
    assert {row for _, row in at} == set(range(len(leaves)))  # a row for each branch
    for node, parent in enumerate(f.parents):
        assert at[node][0] == (at[parent][0] + 1 if parent >= 0 else 0)
        assert parent < 0 or at[node][1] >= at[parent][1]
    for node in range(
        len(at)
    ):  # what descends from a node lies in rows that nothing else has, from its column on
        mine = {node}
        for other in range(node + 1, len(at)):
            if f.parents[other] in mine:
                mine.add(other)
        rows = {at[i][1] for i in mine}
        assert not any(at[i][1] in rows and at[i][0] >= at[node][0] for i in range(len(at)) if i not in mine)


def test_a_tree_is_drawn_with_all_it_says():
    f = family(1)
    section = read(f).all("section")[0]
    assert [t.text for t in section.all("title")] == [
        label + ("" if value is None else f" ({value:.3g})")
        for label, value in zip(f.labels, f.values, strict=True)
    ]
    dots = section.all("path", "dot")
    assert [d["class"].split()[1] for d, v in zip(dots, f.values, strict=True) if v is not None] == [
        f"h{round(v * (STEPS - 1))}" for v in f.values if v is not None
    ]
    assert len(section.all("path", "gone")) == 2 * f.counts.count(0)
    assert len(section.all("text", "sign")) == f.marks.count("mark")
    rows = cells(section.all("table")[0])[1:]
    assert [row[2] for row in rows] == f.labels and [row[1] for row in rows] == [
        "" if parent < 0 else str(parent) for parent in f.parents
    ]
    drawing = section.all("svg")[0]
    width, height = float(drawing["width"]), float(drawing["height"])
    for text in section.all("text"):
        assert 0 <= float(text["x"]) <= width and 0 <= float(text["y"]) <= height
    assert "no data" in read(Tree("T", [], [], [], [], [])).all("section")[0].text


def test_a_deep_tree_is_drawn():
    n = 1200
    f = Tree("T", [i - 1 for i in range(n)], ["x"] * n, [0.5] * n, [1] * n, [""] * n)
    assert len(read(f).all("path", "dot")) == n
