"""The wheel's contents, the direction of imports, and a light import."""

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules():
    """Every source file by its import name; the symbolic links are followed once."""
    found = {}
    for folder, prefix in (("mamba_probe", ""), ("kernels", "mamba_probe."), ("analyses", "mamba_probe.")):
        for path in (ROOT / folder).rglob("*.py"):
            if any(part.is_symlink() for part in [path, *path.parents][:-1] if ROOT in part.parents):
                continue
            name = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path):
    """Absolute names that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaches(package, forbidden, but=()):
    return [
        f"{name} imports {target}"
        for name, path in modules().items()
        if name == package or name.startswith(package + ".")
        for target in imported(path)
        if any(target == f or target.startswith(f + ".") for f in forbidden)
        and not any(target == b or target.startswith(b + ".") for b in but)
    ]


UPPER = ["mamba_probe.probe", "mamba_probe.cli", "mamba_probe.report", "mamba_probe.loading", "mamba_probe.recorder"]
LEAVES = [f"mamba_probe.{name}" for name in ("arguments", "progress", "untrusted", "visible", "writing")]
"""What any part may use: they use none but each other, and no torch."""


@pytest.mark.parametrize(
    ("package", "forbidden", "but"),
    [
        ("mamba_probe.kernels", ["mamba_probe", "transformers", "xarray", "numpy"], ["mamba_probe.kernels"]),
        ("mamba_probe.analyses", ["torch", "transformers", "triton"], []),
        ("mamba_probe.analyses", ["mamba_probe"], ["mamba_probe.analyses", "mamba_probe.trace", *LEAVES]),
        ("mamba_probe.trace", ["torch", "mamba_probe"], ["mamba_probe.trace", *LEAVES]),
        *((leaf, ["torch", "mamba_probe"], LEAVES) for leaf in LEAVES),
        ("mamba_probe.mixers", [*UPPER, "mamba_probe.analyses"], []),
        ("mamba_probe.probe", ["mamba_probe.analyses", "mamba_probe.cli", "mamba_probe.report"], []),
        ("mamba_probe", ["kernels", "analyses", "tests", "examples"], []),
    ],
)
def test_imports_go_one_way(package, forbidden, but):
    assert len(modules()) > 30
    assert breaches(package, forbidden, but) == []


def test_import_is_light_and_leaves_hugging_faces_kernels_alone():
    code = (
        "import sys, mamba_probe;"
        "print([m for m in ('torch', 'triton', 'transformers', 'matplotlib') if m in sys.modules]);"
        "print('kernels' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_public_surface_is_the_explicit_list():
    import mamba_probe

    assert mamba_probe.__all__ == sorted(mamba_probe.__all__, key=lambda n: (n.islower(), n))
    for name in mamba_probe.__all__:
        assert getattr(mamba_probe, name).__doc__, name
    assert set(dir(mamba_probe)) == {*mamba_probe.__all__, "__version__"}
    with pytest.raises(AttributeError, match="module 'mamba_probe' has no attribute 'lode'"):
        mamba_probe.lode  # noqa: B018


def test_what_a_type_checker_reads_is_what_is_imported_when_asked_for():
    """The names below `if TYPE_CHECKING` come from where `__getattr__` finds them."""
    import mamba_probe

    tree = ast.parse((ROOT / "mamba_probe/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    read = {(alias.asname or alias.name): (node.module, alias.name) for node in block.body for alias in node.names}
    assert list(mamba_probe.__all__) == sorted(read, key=lambda n: (n.islower(), n))
    for name, (module, attribute) in read.items():
        home = importlib.import_module(module)
        found = getattr(home, attribute, None) or importlib.import_module(f"{module}.{attribute}")
        assert getattr(mamba_probe, name) is found


def test_no_submodule_has_the_name_of_a_function():
    import mamba_probe

    beside = {path.stem for path in (ROOT / "mamba_probe").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert beside & set(mamba_probe.__all__) == {"blocks", "constructions", "patching", "tasks", "zoo"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    subprocess.run(["git", "-C", ROOT, "checkout-index", "-a", f"--prefix={copy}/"], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, copy],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_one_package_with_kernels_analyses_and_zoo(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mamba_probe"}
    for needed in (
        "mamba_probe/kernels/scan/__init__.py", "mamba_probe/kernels/emission.py",
        "mamba_probe/analyses/wavelet_alignment/measure.py", "mamba_probe/analyses/recall_circuit/plot.py",
        "mamba_probe/zoo/mqar-mamba1/model.safetensors", "mamba_probe/zoo/mqar-mamba1/config.json",
        "mamba_probe/py.typed",
    ):  # fmt: skip
        assert needed in names
    assert not [name for name in names if name.startswith("mamba_probe/kernels/__init__")]


def test_the_wheel_imports_on_its_own(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import mamba_probe as mp; print(mp.__file__); print(mp.load('zoo:mqar-mamba1').config.model_type)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(tmp_path / "mamba_probe/__init__.py"), "mamba"]


def test_a_checkout_without_symlinks_says_so(tmp_path):
    package = tmp_path / "mamba_probe"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "mamba_probe/__init__.py").read_text())
    (package / "kernels").write_text("../kernels")  # what git writes where it may not link
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import mamba_probe"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "ImportError" in done.stderr
    assert "core.symlinks" in done.stderr
