"""The page of a plan, opened in a browser: what it draws is what the plan says."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from braeburn.config import MeshConfig
from braeburn.plan.page import write
from braeburn.plan.pipeline import drawn

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="opens pages in Chromium: Debian's package chromium"
)


def figure(value, confidence="D"):
    return None if value is None else {"value": value, "confidence": confidence}


def layout(step, mesh, memory, links=("ICI", "DCN"), usable=29.5, remat="full", **changes):
    """A plausible layout around its seconds; where the outer link is None, the time upon it is
    unknown.
    """
    seconds = {"matrix": 0.7 * step, "attention": 0.09 * step, "memory_bound": 0.05 * step}
    inner, outer = links
    collectives = [
        {
            "axis": axis,
            "kind": kind,
            "link": link,
            "bytes": int(1e9),
            "seconds": part and part * step,
        }
        for axis, kind, link, part in (
            ("fsdp", "all-gather", inner, 0.12),
            ("fsdp", "reduce-scatter", inner, 0.05),
            ("tensor", "all-gather", inner, 0.04),
            ("tensor", "reduce-scatter", inner, 0.04),
            ("replica", "all-reduce", outer or "network", outer and 0.06),
        )
        if mesh.get(axis, 1) > 1
    ]
    serial = sum(seconds.values()) + sum(one["seconds"] or 0 for one in collectives)
    total = sum(memory.values())
    return {
        "mesh": {"replica": 1, "data": 1, "fsdp": 1, "context": 1, "tensor": 1} | mesh,
        "torus": {"fsdp": [8, 16], "tensor": [8]} if inner == "ICI" else None,
        "remat": remat,
        "accumulation_steps": 1,
        "offload": [],
        "assignments": {f"mesh.{axis}": size for axis, size in mesh.items()}
        | {"remat.policy": remat},
        "fits": usable is None or total <= usable,
        "memory_gib": memory,
        "total_gib": figure(total),
        "usable_gib": figure(usable, "S"),
        "seconds": seconds,
        "collectives": collectives,
        "overlapped": 0.9 * step,
        "serial": serial if all(one["seconds"] is not None for one in collectives) else None,
        "step_seconds": figure(step, "S"),
        "mfu": figure(0.518, "S"),
        "tokens_per_second": figure(16_777_216 / step, "S"),
    } | changes


def memory(parameters, activations):
    return {
        "parameters": parameters,
        "optimizer": 2 * parameters,
        "gradients": parameters,
        "activations": activations,
        "workspace": 2.25,
    }


def target(name, chip, step, links, usable, price, confidence):
    meshes = [
        {"replica": 8, "fsdp": 256, "tensor": 4},
        {"replica": 8, "fsdp": 128, "tensor": 8},
        {"replica": 8, "fsdp": 1024},
        {"replica": 8, "fsdp": 512, "tensor": 2},
        {"replica": 8, "data": 2, "fsdp": 128, "tensor": 4},
        {"fsdp": 8192},
    ]
    remats = ["full", "query+key+value+attention_output", "full", "none", "query+key", "full"]
    core = [
        layout(
            step * (1 + 0.07 * i),
            mesh,
            memory(2.1 + i / 8, 6.3 + (22 if remat == "none" else i)),
            links,
            usable,
            remat,
        )
        for i, (mesh, remat) in enumerate(zip(meshes, remats, strict=True))
    ]
    core[4]["accumulation_steps"] = 2
    core[5]["offload"] = ["optimizer"]
    longer = [
        layout(
            2.4 * step, {"replica": 8, "context": 8, "fsdp": 128}, memory(2.1, 11.8), links, usable
        )
    ]
    productive = step * 375_000 / 86_400
    days = productive / 0.9437
    goodput = {
        "failures_per_chip_hour": 1.97e-5,
        "checkpoint_seconds": 5.52,
        "restart_seconds": 780.0,
        "interval_seconds": 494.0,
        "expected": 0.9437,
        "simulated": 0.9441,
        "days": days,
    }
    return {
        "target": name,
        "chip": chip,
        "refused": None,
        "stages": {
            "core": {
                "layouts": core,
                "days": figure(productive, confidence),
                "tokens": 6_300_000_000_000,
                "steps": 375_000,
            },
            "context-lengthening": {
                "layouts": longer,
                "days": figure(productive / 60, confidence),
                "tokens": 100_000_000_000,
                "steps": 5_960,
            },
        },
        "total": {
            "days": figure(days, confidence),
            "chip_hours": figure(days * 24 * 8192, confidence),
            "cost_usd": figure(price and days * 24 * 8192 * price, confidence),
            "energy_mwh": figure(days * 24 * 8192 * 0.00035, "M") if price else None,
            "goodput": goodput,
        },
    }


def example():
    return {
        "recipe": "afm-server",
        "targets": [
            target("v4:8x1024", "TPU v4", 6.12, ("ICI", "DCN"), 29.5, 3.22, "S"),
            target(
                "mi300x:8192",
                "AMD Instinct MI300X",
                1.87,
                ("Infinity Fabric", None),
                176.0,
                None,
                "M",
            ),
            {
                "target": "groq-lpu:64",
                "chip": "Groq LPU",
                "refused": "it is made for inference only",
                "stages": {},
                "total": {},
            },
        ],
        "claims": [
            {
                "claim": "v5p is 2x v4 in FLOP/s",
                "claimed": 2.0,
                "planned": 1.67,
                "verdict": "no: 459 / 275",
            },
            {
                "claim": "Chana is 1.5x as fast as A100",
                "claimed": 1.5,
                "planned": None,
                "verdict": "cannot be checked",
            },
        ],
    }


class Elements(HTMLParser):
    """(tag, classes, text within) of every element outside scripts and styles."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.all, self._open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        element = [tag, (dict(attributes).get("class") or "").split(), ""]
        self.all.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & {tag for tag, *_ in self._open}:
            for element in self._open:
                element[2] += data

    def texts(self, selector):
        """Of the elements with that tag, or class if it begins with a dot."""
        return [
            text for tag, classes, text in self.all if tag == selector or selector[1:] in classes
        ]


@pytest.fixture
def opened(tmp_path):
    def open_(plan, script="", width=1200):
        """The elements of a plan's page once it has drawn itself and run `script`."""
        write(plan, tmp_path / "plan.html")
        with (tmp_path / "plan.html").open("a") as file:
            file.write(f"<script>{script}</script>")
        # The browser's own window cannot be as narrow as a phone.
        (tmp_path / "frame.html").write_text(
            f"<iframe src=plan.html "
            f"style='border:0;width:{width}px;height:900px'></iframe><script>onload = () => "
            "document.write(document.querySelector('iframe')"
            ".contentDocument.documentElement.outerHTML)</script>"
        )
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--allow-file-access-from-files",
                "--window-size=1400,1000",
                "--dump-dom",
                (tmp_path / ("frame.html" if width < 500 else "plan.html")).as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return Elements(done.stdout)

    return open_


@needs_browser
def test_charts_draw_what_the_plan_says(opened):
    plan = example()
    page = opened(plan)
    assert not page.texts(".error")
    planned = [target for target in plan["targets"] if not target["refused"]]
    stages = [stage for target in planned for stage in target["stages"].values()]
    layouts = [layout for stage in stages for layout in stage["layouts"]]
    assert len(page.texts("figure")) == 3 * len(stages)
    # One more of each in the legends, of which every stage has one.
    for mark in (".bar", ".interval", ".point"):
        assert len(page.texts(mark)) == len(layouts) + len(stages)
    assert len(page.texts(".limit")) == len(layouts) + len(stages)
    known = [
        one for layout in layouts for one in layout["collectives"] if one["seconds"] is not None
    ]
    parts = sum(len(layout["memory_gib"]) + len(layout["seconds"]) for layout in layouts)
    assert len(page.texts(".segment")) == parts + len(known)
    assert len(page.texts("table")) == 3 + len(stages)
    assert len([text for text in page.texts("tr") if text.startswith("v4:8x1024")]) == 1 + 2

    body = " ".join(page.texts("body"))
    for text in (
        "Plan of afm-server",
        "6.12 sS",
        "51.8%S",
        "$17.8MS",
        "94.4%",
        "replica 8 · fsdp 256 · tensor 4",
        "torus: fsdp 8×16, tensor 8",
        "fsdp all-gather over ICI 0.734",
        "activations 6.30",
        "usable: 29.5 GiBS",
        "40.5 GiBDdoes not fit",
        "refused: it is made for inference only",
        "cannot be checked",
    ):
        assert text in body, text


@needs_browser
def test_a_schedule_is_drawn_task_by_task(opened):
    plan = example()
    mesh = MeshConfig(fsdp=1, pipeline=4, stages_per_device=2)
    stage = next(iter(plan["targets"][0]["stages"].values()))
    stage["schedules"] = [{"rank": "own"} | drawn(mesh, 8, False)]
    page = opened(plan)
    assert not page.texts(".error")
    # One more of each in the legend.
    assert len(page.texts(".forward")) == len(page.texts(".backward")) == 4 * 2 * 8 + 1
    assert len(page.texts(".device")) == 4
    body = " ".join(page.texts("body"))
    assert "Schedule of the recipe's own layout: interleaved 1F1B, 4 devices with 2 stages" in body
    assert f"idle {100 * 3 / (2 * 8 + 3):.1f}% of the time" in body


@needs_browser
def test_text_is_never_markup(opened):
    hostile = (
        "</script><script>document.body.className='owned'</script><!-- <img src=x> \\u003c "
        "\"'`${1}\u2028"
    )
    plan = example()

    def spoil(value):
        if isinstance(value, dict):
            return {
                key: item if key in ("value", "seconds") else spoil(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return hostile if isinstance(value, str) else value

    plan = spoil(plan)
    for target in plan["targets"]:
        target["stages"] = {f"{name} {hostile}": stage for name, stage in target["stages"].items()}
    plan["targets"][0]["stages"][f"core {hostile}"]["layouts"][0]["memory_gib"][hostile] = 1.5
    plan["targets"][0]["refused"] = plan["targets"][1]["refused"] = None
    page = opened(plan)
    assert not page.texts(".error")
    assert not page.texts("img")
    assert not page.texts(".owned")
    assert page.texts("h1") == [f"Plan of {hostile}"]
    assert f"Stage core {hostile}" in page.texts("summary")
    assert [text for text in page.texts("tr") if text.endswith(f"refused: {hostile}")]


@needs_browser
def test_what_is_unknown_is_said_to_be(opened):
    plan = example()
    for target in plan["targets"][:2]:
        target["total"] = dict.fromkeys(target["total"])
        for stage in target["stages"].values():
            stage["days"] = None
            for layout in stage["layouts"]:
                for name in ("serial", "step_seconds", "mfu", "tokens_per_second", "usable_gib"):
                    layout[name] = None
    plan["targets"][1]["stages"]["core"]["layouts"] = []
    page = opened(plan)
    assert not page.texts(".error")
    rows = [text for text in page.texts("tr") if text.startswith("v4:8x1024")]
    assert rows[0] == "v4:8x1024TPU v4" + "unknown" * 5
    assert rows[1].endswith("replica 8 · fsdp 256 · tensor 4" + "unknown" * 4)
    assert not page.texts(".limit")[3:]
    assert "No layout was found." in page.texts("p")
    assert not [
        text
        for text in page.texts("body")
        if "NaN" in text or "undefined" in text or "null" in text
    ]


@needs_browser
def test_layouts_sort_and_what_is_unknown_stands_last(opened):
    plan = example()
    plan["targets"] = plan["targets"][:1]
    plan["targets"][0]["stages"].pop("context-lengthening")
    plan["targets"][0]["stages"]["core"]["layouts"][1]["mfu"] = None
    for i, layout in enumerate(plan["targets"][0]["stages"]["core"]["layouts"]):
        layout["mfu"] = None if i == 1 else figure((0.4, 0, 0.5, 0.1, 0.3, 0.2)[i])
    press = (
        "for (const b of document.querySelectorAll('button')) if (b.textContent === 'MFU') { "
        "CLICKS }"
    )
    for clicks, order in ((1, "465132"), (2, "315642")):
        page = opened(plan, press.replace("CLICKS", "b.click();" * clicks))
        rows = [text for text in page.texts("tr") if "torus: " in text]
        assert "".join(text[0] for text in rows) == order


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_overlaps_or_sticks_out(opened, width):
    plan = example()
    plan["recipe"] = "a_recipe_of_a_very_long_name_without_any_place_to_break_it" * 3
    measure = """
        const overlapping = [...document.querySelectorAll(".axis .track")].filter(track => {
          const boxes = [...track.children].map(child => child.getBoundingClientRect());
          return boxes.some((box, i) => i && box.width && box.left < boxes[i - 1].right);
        });
        const inside = document.documentElement.scrollWidth <= innerWidth;
        document.body.append(make("output", {}, `${overlapping.length} ${inside} ${innerWidth}`));
    """
    (output,) = opened(plan, f"addEventListener('load', () => {{ {measure} }})", width).texts(
        "output"
    )
    overlapping, inside, inner = output.split()
    assert (overlapping, inside) == ("0", "true")
    assert int(inner) == width if width < 500 else int(inner) > 1000


def test_the_page_is_whole(tmp_path):
    path = tmp_path / "plan.html"
    plan = example()
    plan["recipe"] = hostile = "</script><!-- \u2028 {{plan}} & \"'"
    path.write_text("an older page")
    write(plan, path)
    text = path.read_text("utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.html"]
    assert not re.search(
        r"https?:|//[a-z]+\.|\bsrc=|@import|url\(|<link|\bfetch\(|innerHTML|insertAdjacent", text
    )
    assert "default-src 'none'" in text
    start = text.index('id="plan">') + len('id="plan">')
    data = text[start : text.index("</script", start)]
    assert "<" not in data
    assert json.loads(data) == plan
    assert json.loads(data)["recipe"] == hostile


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    plan = example()
    plan["targets"][0]["total"]["days"]["value"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write(plan, tmp_path / "plan.html")
    assert list(tmp_path.iterdir()) == []
