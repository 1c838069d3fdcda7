"""The house: what may import what, and the names that users rely on."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import mujax

PACKAGE = pathlib.Path(mujax.__file__).parent

NAMES_OF_0_3_0 = """
    AuditError Batches ConfigError CoordCheck Correction DataError DepthError Finding Functional
    MujaxError MujaxWarning MupModel MupSpec ParamSpec Parametrization ParametrizationError
    RoleError ShapeMismatchError SpecMismatchError StudyError Sweep TraceMismatchError TransferCheck
    TransferConfig Transferred TuneConfig WiderIsBetter audit coord_check interpolate mup_acprop
    mup_adabelief mup_adadelta mup_adafactor mup_adagrad mup_adam mup_adamax mup_adamaxw mup_adamw
    mup_adan mup_add_decayed_weights mup_ademamix mup_adopt mup_amsgrad mup_clip_by_global_norm
    mup_cocob mup_dadapt_adamw mup_dog mup_dowg mup_dpsgd mup_fromage mup_galore mup_global_norm
    mup_init mup_lamb mup_lars mup_lbfgs mup_lion mup_madgrad mup_mechanize mup_momo mup_momo_adam
    mup_muon mup_nadam mup_nadamw mup_noisy_sgd mup_normalize mup_novograd mup_optimistic_adam
    mup_optimistic_adam_v2 mup_optimistic_gradient_descent mup_polyak_sgd mup_prodigy mup_radam
    mup_rmsprop mup_rprop mup_scale_by_acprop mup_scale_by_adadelta mup_scale_by_adam
    mup_scale_by_adamax mup_scale_by_adan mup_scale_by_ademamix mup_scale_by_adopt
    mup_scale_by_amsgrad mup_scale_by_belief mup_scale_by_factored_rms mup_scale_by_lion
    mup_scale_by_madgrad mup_scale_by_muon mup_scale_by_novograd mup_scale_by_optimistic_gradient
    mup_scale_by_radam mup_scale_by_rms mup_scale_by_rprop mup_scale_by_rss mup_scale_by_sgd
    mup_scale_by_sign mup_scale_by_simplified_ademamix mup_scale_by_sm3 mup_scale_by_stddev
    mup_scale_by_trust_ratio mup_scale_by_yogi mup_schedule_free_adamw mup_schedule_free_sgd mup_sgd
    mup_sign_sgd mup_signum mup_simplified_ademamix mup_sm3 mup_sophia mup_wrap mup_yogi
    residual_branch sweep training_run transfer transfer_check tune wider_is_better
"""


@pytest.mark.parametrize("name", NAMES_OF_0_3_0.split())
def test_a_public_name_of_0_3_0(name):
    assert callable(getattr(mujax, name))


def test_what_has_no_rule_is_no_part_of_the_api():
    assert not hasattr(mujax, "mup_nothing")
    assert "mup_lbfgs" not in dir(mujax)
    assert "mup_lbfgs" not in dir(mujax.optim)
    with pytest.raises(mujax.ConfigError, match=r"^lbfgs: expected an optimizer with a learning rate"):
        mujax.mup_lbfgs(0.1)


def _module(file: pathlib.Path) -> str:
    parts = ["mujax", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _behind_a_door(package: pathlib.Path) -> list[str]:
    """Imports of an underscored module from outside of the package that it is in."""
    found = []
    for file in sorted(package.rglob("*.py")):
        mine = _module(file) if file.is_relative_to(PACKAGE) else "elsewhere"
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("mujax"):
                continue
            for target in (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)):
                private = re.match(r"(mujax(?:\.[a-z]\w*)*)\._\w+", target)
                if private and not f"{mine}.".startswith(f"{private[1]}."):
                    found.append(f"{file.name}: {target}")
    return found


def test_nobody_looks_behind_a_door():
    """Every file behind a package's `__init__` is underscored and imported by nobody outside."""
    assert _behind_a_door(PACKAGE) == []


def test_looking_behind_a_door_is_found(tmp_path):
    file = tmp_path / "user.py"
    file.write_text("from mujax.train._step import init_state\nfrom mujax.train import _step, train_step\n")
    assert _behind_a_door(tmp_path) == ["user.py: mujax.train._step", "user.py: mujax.train._step.init_state",
                                        "user.py: mujax.train._step"]  # fmt: skip


def test_files_behind_a_door_are_underscored():
    public = {"cli/__main__.py"}
    for file in PACKAGE.rglob("*.py"):
        name = str(file.relative_to(PACKAGE))
        if "/" in name and file.name != "__init__.py":
            assert file.name.startswith("_"), name
    assert all((PACKAGE / name).is_file() for name in public)


def test_only_program_knows_how_jax_represents_programs():
    words = re.compile(r'num_consts|num_carry|"jaxpr"|call_jaxpr|"branches"')
    hits = {
        str(file.relative_to(PACKAGE).parent)
        for file in PACKAGE.rglob("*.py")
        if words.search(file.read_text()) and "core/program" not in str(file)
    }
    assert hits == set()


# What only checks, training, sweeps or commands need.
_HEAVY = {
    *("grain", "matplotlib", "optuna", "orbax", "pandas", "scipy", "tensorboardX", "tensorstore", "tyro"),
    *("mujax.check", "mujax.cli", "mujax.data", "mujax.models", "mujax.plot", "mujax.train", "mujax.tune"),
}


def _printed(code: str) -> list[list[str]]:
    """The lines that some code prints, as words."""
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_importing_mujax_imports_nothing_heavy():
    """Flax itself brings rich and yaml."""
    show = "print(*sys.modules)"
    before, imported, used = _printed(
        f"import jax, flax, optax; {show}; import mujax; {show}; mujax.mup_init; mujax.mup_adam; {show}"
    )
    assert {name for name in set(imported) - set(before) if name.startswith("mujax")} == {
        "mujax",
        "mujax.errors",
    }
    assert not _HEAVY & (set(used) - set(before))


def test_names_for_type_checkers_are_those_that_are_there():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    mine = [node for node in imports if (node.module or "").startswith("mujax.")]
    typed = {alias.name for node in mine for alias in node.names}
    public = {name for name in dir(mujax) if not name.startswith("_")}
    assert typed == {
        name for name in public if getattr(getattr(mujax, name), "__module__", "").startswith("mujax")
    }


def test_what_trains_is_imported_on_use_and_tune_stays_the_function():
    (used, imported, modules) = _printed(
        "import mujax; from mujax.tune import sweep; print(mujax.tune.__name__)\n"
        "import mujax.tune; print(mujax.tune.__name__); mujax.coord_check; print(*sys.modules)"
    )
    assert [used, imported] == [["tune"], ["tune"]]
    assert {"mujax.check", "mujax.train", "mujax.tune"} <= set(modules)
