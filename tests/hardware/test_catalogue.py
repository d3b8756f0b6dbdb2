"""The catalogue of accelerators, what a user's own file does to it, and how it is printed."""

import json
import math
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import braeburn
from braeburn.errors import UserError
from braeburn.hardware.catalogue import FIGURES, LEGEND, Figure, catalogue, chip_of, facts, weakest

NAMES = """v4 v5e v5p v6e tpu7x a100 h100 h200 b200 gb200 mi250x mi300x mi325x mi355x gaudi2 gaudi3
trainium2 s4000 tiangai-100 chana wse-3 groq-lpu sohu ascend-910b3 ascend-910c cpu"""


def test_every_chip_is_there() -> None:
    assert list(catalogue()) == NAMES.split()
    assert all(chip.name == name for name, chip in catalogue().items())


@pytest.mark.parametrize(
    ("chip", "field", "value", "confidence"),
    [
        ("v4", "bf16_tflops", 275, "V"),
        ("v4", "link_gb_per_s", 300, "S"),  # stated one way
        ("v4", "usable_memory_gib", 30.75, "D"),
        ("v5e", "link_gb_per_s", 200, "V"),  # the others of both ways
        ("v5p", "link_gb_per_s", 600, "V"),
        ("v5p", "memory_gb_per_s", 2765, "V"),
        ("v5e", "network_gb_per_s", 3.125, "V"),  # 6.4 Tbit/s for each pod of 256
        ("v5p", "network_gb_per_s", 6.25, "V"),  # 50 Gbit/s for each chip
        ("tpu7x", "network_gb_per_s", 12.5, "S"),
        ("v5p", "usable_memory_gib", 95.73, "D"),
        ("v5p", "clock_ghz", 1.75, "D"),
        ("v6e", "int8_tops", 1836, "V"),
        ("tpu7x", "price", 12, "S"),
        ("a100", "network_gb_per_s", 25, "V"),
        ("h100", "link_gb_per_s", 450, "V"),
        ("h100", "memory_gb", 80, "V"),
        ("h100", "int8_tops", 1979, "S"),
        ("h200", "watts", 700, "V"),
        ("h100", "price", 6.88, "S"),
        ("gb200", "domain", 72, "V"),
        ("mi250x", "bf16_tflops", 383, "S"),
        ("mi250x", "network_gb_per_s", 25, "S"),
        ("mi355x", "watts", 1400, "S"),
        ("mi300x", "int8_tops", 2615, "V"),
        ("mi300x", "link_gb_per_s", 448, "V"),  # 7 links of 16 lanes at 32 GT/s
        ("gaudi2", "link_gb_per_s", 262.5, "V"),  # 21 of 24 ports; the others leave the node
        ("gaudi3", "link_gb_per_s", 525, "V"),
        ("gaudi3", "network_gb_per_s", 75, "V"),
        ("trainium2", "link_gb_per_s", 640, "M"),  # of no stated direction
        ("s4000", "memory_gb_per_s", 768, "S"),
        ("wse-3", "memory_gb_per_s", 21_000_000, "S"),
        ("ascend-910c", "bf16_tflops", 781, "D"),
    ],
)
def test_figures(chip: str, field: str, value: float, confidence: str) -> None:
    figure = getattr(catalogue()[chip], field)
    assert (figure.value, figure.confidence) == (value, confidence)


# Figures of V that were read before sources were noted. Whoever finds the document of one takes it
# off.
UNCITED = """v5p.int8_tops tpu7x.memory_gb_per_s tpu7x.link_gb_per_s a100.bf16_tflops
h100.bf16_tflops h100.memory_gb_per_s h200.bf16_tflops b200.bf16_tflops gb200.bf16_tflops
mi355x.bf16_tflops trainium2.domain facts.v5p_over_v4_speed"""


def test_a_figure_of_the_vendors_documentation_names_the_document() -> None:
    figures = {
        f"{name}.{field}": figure
        for name, chip in catalogue().items()
        for field in FIGURES
        if (figure := getattr(chip, field))
    } | {f"facts.{name}": figure for name, figure in facts().items()}
    uncited = {
        name for name, figure in figures.items() if figure.confidence == "V" and not figure.source
    }
    assert uncited == set(UNCITED.split())
    # A source is a title and an address, of which nobody's memory has any.
    assert all("https://" in figure.source for figure in figures.values() if figure.source)
    assert not any(figure.source for figure in figures.values() if figure.confidence in "MD")


def test_the_documents_are_used_and_listed_in_the_docs() -> None:
    folder = Path(braeburn.__file__).parent
    tables = tomllib.loads((folder / "hardware" / "chips.toml").read_text("utf-8"))
    documents = tables.pop("sources")
    used = set()
    for table in tables.values():
        for given in table.values():
            source = given.get("source", []) if isinstance(given, dict) else []
            used.update([source] if isinstance(source, str) else source)
    assert used == set(documents)
    page = (Path(__file__).parents[2] / "docs" / "chips.md").read_text("utf-8")
    for document in documents.values():
        title, _, address = document.rpartition(", ")
        assert f"| [{title}]({address}) |" in page


def test_the_source_of_a_figure(tmp_path: Path) -> None:
    built_in = catalogue()["mi300x"].link_gb_per_s
    assert built_in and built_in.source.split("; ") == [
        "AMD, Instinct MI300 series microarchitecture, https://github.com/ROCm/legacy-rocm-build/"
        "blob/develop/docs/conceptual/gpu-arch/mi300.md",
        "AMD, amdgpu_xgmi.c in Linux, https://github.com/torvalds/linux/blob/master/drivers/gpu/"
        "drm/amd/amdgpu/amdgpu_xgmi.c",
    ]
    path = tmp_path / "chips.toml"
    path.write_text(
        '[sources]\nsheet = "Maker, Sheet, https://maker.example"\n'
        '[h100]\nprice = {value = 2, source = "sheet"}\n'
        'watts = {value = 650, source = ["sheet", "a talk"]}\n'
        '[facts]\nfrontier_modules = {value = 10, source = "tpu-v4"}\n'
    )
    chip = catalogue(path)["h100"]
    assert chip.price == Figure(2, "U", "", "Maker, Sheet, https://maker.example")
    assert chip.watts == Figure(650, "U", "", "Maker, Sheet, https://maker.example; a talk")
    assert facts(path)["frontier_modules"].source.startswith("Google Cloud, TPU v4, https://")
    assert "sources" not in catalogue(path)


def test_what_is_unknown_stays_unknown() -> None:
    chips = catalogue()
    assert [field for field in FIGURES if getattr(chips["chana"], field)] == ["domain"]
    for chip, field in [
        ("v5p", "watts"),
        ("gb200", "price"),
        ("tiangai-100", "domain"),
        ("tpu7x", "clock_ghz"),
    ]:
        assert getattr(chips[chip], field) is None
    assert not any(getattr(chips["cpu"], field) for field in FIGURES)


def test_what_a_plan_needs_is_known_of_every_chip_that_is_not_refused() -> None:
    chips = catalogue()
    assert {name for name, chip in chips.items() if chip.refused} == {
        "chana",
        "wse-3",
        "groq-lpu",
        "sohu",
        "cpu",
    }
    for chip in chips.values():
        if not chip.refused:
            assert (
                chip.bf16_tflops
                and chip.memory_gb
                and chip.memory_gb_per_s
                and chip.usable_memory_gib
            )
            # Nothing takes more than there is, of gigabytes that may be those of 2^30.
            assert 0.85 < chip.usable_memory_gib.value / chip.memory_gb.value < 1.01


def test_the_built_in_table_is_whole() -> None:
    extras = {"google": "tpu", "nvidia": "cuda", "amd": "rocm"}
    for chip in catalogue().values():
        assert (
            (chip.dimensions in (2, 3) and chip.max_slice > 0)
            == (chip.family == "tpu")
            == (chip.maker == "google")
        )
        assert chip.extra == extras.get(chip.maker, "")
        assert bool(chip.extra) == bool(chip.device_kinds) and (not chip.extra or chip.back_end)
        figures = [figure for field in FIGURES if (figure := getattr(chip, field))]
        assert not any(figure.confidence == "U" for figure in figures)
        assert all(
            figure.note for figure in figures if figure.confidence == "D" and figure.value != 781
        )
        if (
            chip.clock_ghz and chip.bf16_tflops
        ):  # a whole number of systolic arrays of 128 x 128, or of 256 x 256
            per_cycle = chip.bf16_tflops.value * 1e3 / chip.clock_ghz.value
            assert math.log2(per_cycle) == pytest.approx(round(math.log2(per_cycle)), abs=0.01)
    kinds = [kind for chip in catalogue().values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert all(letter in "VSDM" for letter in (figure.confidence for figure in facts().values()))


def test_flags_have_reasons() -> None:
    flags = {
        name: [flag.name for flag in chip.flags] for name, chip in catalogue().items() if chip.flags
    }
    assert "xla_tpu_scoped_vmem_limit_kib" in flags["v5p"]
    assert all(flag.reason for chip in catalogue().values() for flag in chip.flags)


def test_what_computing_hides_is_told_where_schedules_were_read(tmp_path: Path) -> None:
    told = {name: chip.hidden for name, chip in catalogue().items() if chip.hidden}
    assert set(told) == {"v4", "v5e", "v5p", "v6e"}
    assert all(hidden.reason for hidden in told.values())
    # Nothing on a v4 is started and awaited apart.
    assert (told["v4"].weights, told["v4"].tokens) == (0, 0)
    own = tmp_path / "chips.toml"
    own.write_text('[v4.hidden]\nweights = 1.2\ntokens = 0\nreason = "seen"\n')
    with pytest.raises(UserError, match=r"v4\.hidden\.weights"):
        catalogue(own)


def test_chips_by_what_jax_calls_them() -> None:
    assert chip_of("TPU v5") == catalogue()["v5p"]
    assert chip_of("NVIDIA H100 80GB HBM3") == catalogue()["h100"]
    assert chip_of("AMD Instinct MI250X / MI250") == catalogue()["mi250x"]
    assert chip_of("TPU v5 litepod") is chip_of("cpu") is None


def test_the_weakest_confidence() -> None:
    assert [weakest("V", letter) for letter in "VSUDM"] == list("VSUDM")
    assert weakest(Figure(1, "S"), "D", Figure(2, "V")) == "D"
    assert weakest("U", "S") == "S"
    assert all(f"{letter} " in LEGEND for letter in "VSUDM")


def test_a_users_file_overrides_figures_and_adds_chips(tmp_path: Path) -> None:
    path = tmp_path / "chips.toml"
    path.write_text(
        '[h100]\nprice = 2.1\nwatts = {value = 650, confidence = "V", note = "capped"}\n'
        "[Mine]\nbf16_tflops = 100\nmemory_gb = 24\nmemory_gb_per_s = 900\nper_node = 2\n"
        "[facts]\nfrontier_modules = 10\n"
    )
    chips, built_in = catalogue(path), catalogue()
    assert chips["h100"].price == Figure(2.1, "U")
    assert chips["h100"].watts == Figure(650, "V", "capped")
    assert (
        replace(chips["h100"], price=built_in["h100"].price, watts=built_in["h100"].watts)
        == built_in["h100"]
    )
    assert chips["mine"].bf16_tflops == Figure(100, "U") and chips["mine"].title == "mine"
    assert {name: chip for name, chip in chips.items() if name not in ("h100", "mine")} == {
        name: chip for name, chip in built_in.items() if name != "h100"
    }
    assert facts(path) == {**facts(), "frontier_modules": Figure(10, "U")}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[h100]\nprise = 2", "'h100.prise' is not a field; did you mean 'price'"),
        ("[h100]\nprice = -1", "h100.price.value=-1 is not valid: it should be greater than 0"),
        (
            "[h100]\nprice = 'cheap'",
            "h100.price.value='cheap' is not valid: it should be a valid number",
        ),
        ("[h100]\nprice = true", "h100.price.value=True is not valid: it should be a valid number"),
        ("[h100]\nprice = inf", "h100.price.value=inf is not valid: it should be a finite number"),
        ("[h100]\nprice = {value = 2, trust = 'V'}", "'h100.price.trust' is not a field"),
        (
            "[h100]\nprice = {value = 2, confidence = 'X'}",
            "h100.price.confidence='X' is not valid: it should be 'M'",
        ),
        ("[h100]\nprice = {confidence = 'V'}", "h100.price.value is missing; give it a value"),
        ("[h100]\nper_node = 0", "h100.per_node=0 is not valid: it should be greater than 0"),
        (
            "[h100]\nextra = 'metal'",
            "h100.extra='metal' is not valid: it should be '', 'tpu', 'cuda' or 'rocm'",
        ),
        (
            "[h10]\nbf16_tflops = 2",
            "[h10] is not in the catalogue, and a new chip needs memory_gb, memory_gb_per_s",
        ),
        (
            "[v9]\nfamily = 'tpu'\nbf16_tflops = 1\nmemory_gb = 1\nmemory_gb_per_s = 1",
            "a new chip needs link_gb_per_s, dimensions, max_slice",
        ),
        ("price = 2", "price=2 is of no chip; write the chip's name above it, as in [h100]"),
        ("[h100", "chips.toml' is not TOML (Expected ']'"),
        ("[facts]\nfrontier_modules = -1", "facts.frontier_modules.value=-1 is not valid"),
        (
            "[h100]\nprice = {value = 2, source = 3}",
            "h100.price.source=3 is not valid: it should be a valid string",
        ),
        ("[sources]\nsheet = 3", "sources.sheet=3 is not valid: it should be a valid string"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "chips.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        catalogue(path), facts(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(
            UserError, match=r"^--chips .* cannot be read \(.*\); name a TOML file$"
        ):
            catalogue(path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b"[h100]\nprice = '\xe9'")
    with pytest.raises(UserError, match="is not TOML"):
        catalogue(path)


def test_the_file_says_nothing_twice() -> None:
    """Each table of the file is a chip or the facts, and no chip's flags are given one by one
    elsewhere.
    """
    text = (Path(braeburn.__file__).parent / "hardware" / "chips.toml").read_text("utf-8")
    assert set(tomllib.loads(text)) == {*NAMES.split(), "facts", "sources"}


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from braeburn.cli import main

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["braeburn", "chips", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code in (0, None)
        return capsys.readouterr().out

    lines = run().splitlines()
    assert lines[0].split()[:3] == ["chip", "bf16", "tflops"]
    assert [line.split()[0] for line in lines[1:-1]] == NAMES.split()
    h100, chana = (
        next(line for line in lines if line.startswith(name)) for name in ("h100 ", "chana ")
    )
    assert "989 V" in h100 and "6.88 S" in h100 and "unknown" in h100  # its clock
    assert "refused: no specification of it has been published" in chana
    assert lines[-1] == f"confidence: {LEGEND}"

    path = tmp_path / "chips.toml"
    path.write_text("[h100]\nprice = 2.1\n")
    listed = json.loads(run("--json", "--chips", str(path)))
    assert list(listed) == NAMES.split()
    assert listed["h100"]["price"] == {"value": 2.1, "confidence": "U", "note": "", "source": ""}
    assert listed["h100"]["network_gb_per_s"]["source"].startswith("NVIDIA, Eos (DGX H100)")
    assert listed["gb200"]["price"] is None
    assert listed["v5p"]["flags"][0]["reason"]

    claims = json.loads(run("--claims", "--json"))
    assert len(claims) == 9
    assert {check["tolerance"] for claim in claims for check in claim["checks"]} == {0.05}
    text = run("--claims")
    assert text.count("(tolerance 5%") == 8  # of Chana nothing can be checked
    assert text.count("verdict") == 9 and "wrong: bf16 1.67x, not 2x" in text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a = " + "[" * 100_000 + "]" * 100_000, "is not TOML (maximum recursion depth exceeded"),
        ("[h100]\nmemory_gb = " + "9" * 5000, "is not TOML (Exceeds the limit (4300 digits)"),
        ("[h100]\nmemory_gb = " + "9" * 400, "h100.memory_gb.value="),
        (
            "# " + "x" * 2**20,
            "has 1,048,578 bytes, more than the 1,048,576 that such a file can have",
        ),
    ],
)
def test_files_beyond_reason(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "chips.toml"
    path.write_text(content)
    with pytest.raises(UserError) as refusal:
        catalogue(path)
    assert sentence in str(refusal.value) and len(str(refusal.value)) < 500


def test_chips_in_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder where a file belongs\); name a TOML file"):
        catalogue(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"is not an ordinary file\); name a TOML file"):
        catalogue(tmp_path / "pipe")
