"""Two and four gloo processes train a sharded model as DDP does, and write and read checkpoints of any shape."""

import contextlib
import errno
import itertools
import json
import pickle
import random
import time
import zipfile
from argparse import Namespace
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from processes import forkserver
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from conftest import random_values, tiny_model
from engine_fractalgen import Recipe, make_optimizer, train_step
from models.generator import Mask
from models.hub import convert
from util import checkpoint
from util.dist import World
from util.errors import UserError
from util.files import HashingFile, sha256
from util.run.meters import Window
from util.run.state import RunState

STEPS = 3  # 50 in `pytest -m slow`
CPU = torch.device("cpu")
RECIPE = dict(lr=1e-3, min_lr=0.0, lr_schedule="constant", warmup_epochs=0, epochs=1, grad_clip=1.0)
TWO_AND_FOUR = pytest.mark.parametrize("size", ["two", pytest.param("four", marks=pytest.mark.slow)])
DROPLESS = dict(attn_dropout=0.0, proj_dropout=0.0)


class Trained:
    """A tiny model that takes steps on random images, sharded or in DDP or, in one process, by itself."""

    def __init__(self, kind: str, world: World, how: str, accum_iter: int = 1, dtype=None, **changes):
        model = tiny_model(kind, **changes).train()
        self.world, self.recipe, self.sharded = world, Recipe(accum_iter=accum_iter, **RECIPE), None
        if how == "sharded":
            from util.run.sharding import Sharded

            self.sharded = Sharded(model, dtype, CPU)
        self.state = RunState(
            model, make_optimizer(model, self.recipe), world, half=False, ema_decay=0.5, start_epoch=0, steps=STEPS,
            images=4, bits={}, sharded=self.sharded,
        )  # fmt: skip
        self.model = DistributedDataParallel(model) if how == "ddp" else model
        self.autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)

    def step(self, spoil: bool = False) -> tuple[float, float]:
        """Returns loss and norm of the gradient; a process that spoils the step has a loss that is not finite."""
        state, rank = self.state, self.world.rank
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(1000 * state.step + rank)
        batches = itertools.repeat(
            (random_values(2, 8, seed=10 * state.step + rank), torch.tensor([0, 3]), None)
        )
        nan = lambda module, inputs, output: (output[0] * torch.nan, output[1])  # noqa: E731
        handle = self.model.register_forward_hook(nan) if spoil else None
        loss, norm = train_step(
            self.model, batches, state.optimizer, state.scaler, self.recipe, Window(CPU), CPU, self.autocast
        )
        if handle is not None:
            handle.remove()
        state.step += 1
        state.ema.update(state.model, step=state.step)
        return loss.item(), norm.item()

    def bytes(self) -> dict[str, int]:
        """What this process keeps of weights, gradients, moments and average."""
        own = lambda xs: sum(getattr(x, "to_local", lambda x=x: x)().nbytes for x in xs if x is not None)  # noqa: E731
        params, kept = list(self.state.model.parameters()), self.state.optimizer.state.values()
        moments = [x for of_weight in kept for x in of_weight.values() if x.dim()]
        average = self.state.ema.module.parameters()
        return {"weights": own(params), "moments": own(moments), "average": own(average)}


def joined(trained: Trained) -> dict:
    """All weights, moments and averages, as ordinary tensors."""
    full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x.clone()  # noqa: E731
    state = trained.state
    moments = state.optimizer.state_dict()["state"]
    return {
        "model": {name: full(x) for name, x in state.model.state_dict().items()},
        "model_ema": {name: full(x) for name, x in state.ema.module.state_dict().items()},
        "moments": {f"{i} {name}": full(x) for i, kept in moments.items() for name, x in kept.items()},
    }


def same(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check_training(world: World, report: dict, steps: int) -> None:
    for kind, accum_iter in (("ar", 1), ("mar", 2), ("guided", 1)):
        ddp, sharded = (Trained(kind, world, how, accum_iter, **DROPLESS) for how in ("ddp", "sharded"))
        report[kind] = {
            "losses": [[one.step() for _ in range(steps)] for one in (ddp, sharded)],
            "bytes": [one.bytes() for one in (ddp, sharded)],
        }
        gradient = lambda p: p.grad.to_local().nbytes  # noqa: E731
        sharded.model(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])).backward()
        report[kind]["gradients"] = sum(gradient(p) for p in sharded.model.parameters() if p.grad is not None)


def check_bfloat16(world: World, report: dict) -> None:
    ddp, sharded = (
        Trained("guided", world, how, 1, torch.bfloat16, **DROPLESS) for how in ("ddp", "sharded")
    )
    report["bfloat16"] = [[one.step() for _ in range(3)] for one in (ddp, sharded)]
    report["kept in"] = sorted({str(x.dtype) for part in joined(sharded).values() for x in part.values()})


def check_full_disk(world: World, report: dict, folder) -> None:
    """The disk of the last process has room for two checkpoints."""
    trained, write = Trained("ar", world, "sharded"), HashingFile.write

    def full(self, data):
        if world.rank == world.size - 1 and len(list(folder.glob("*.shards"))) > 2:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return write(self, data)

    folder.mkdir(exist_ok=True)
    HashingFile.write, report["errors"] = full, []
    for final in (True, True, True, False, False, True):
        trained.step()
        report["errors"].append(trained.state.save(folder, 9, None, final))
    HashingFile.write = write
    report["left"] = sorted(path.name for path in folder.glob("checkpoint-0*.pth"))


def check_bad_step(world: World, report: dict) -> None:
    """The loss of the last process alone is not finite."""
    trained = Trained("ar", world, "sharded")
    trained.step()
    before = joined(trained)
    norm = trained.step(spoil=world.rank == world.size - 1)[1]
    after = joined(trained)
    report["bad step"] = {
        "norm": norm,
        "same": same(before["model"], after["model"]) and same(before["moments"], after["moments"]),
    }
    report["after"] = trained.step()


def check_few(world: World, report: dict) -> None:
    """On the last process one patch of an image reaches the second level, on the others all of them do."""
    one, alone = Trained("guided", world, "sharded", **DROPLESS), tiny_model("guided", **DROPLESS).train()
    images, labels = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8), torch.tensor([0, 1])

    def loss(model, rank: int) -> torch.Tensor:
        masked = torch.arange(16) < (1 if rank == world.size - 1 else 16)
        masks = Mask.of(masked.repeat(2, 1)), Mask.of(torch.ones(2 * int(masked.sum()), 4))
        return model(images, labels, masks=masks, label_drop=labels > 1, dither=0.0)

    loss(one.model, world.rank).backward()
    for rank in range(world.size):
        (loss(alone, rank) / world.size).backward()
    pairs = zip(one.model.parameters(), alone.parameters(), strict=True)
    report["few"] = max((ours.grad.full_tensor() - theirs.grad).abs().max().item() for ours, theirs in pairs)


def check_saving(world: World, report: dict, folder) -> None:
    trained = Trained("guided", world, "sharded")
    for _ in range(3):
        trained.step()
    truth = joined(trained)
    report["error"] = trained.state.save(folder / "sharded", 2, None, final=False)
    trained.step()  # while it is written
    report["error of the end"] = trained.state.finish(folder / "sharded")
    if world.is_main:
        torch.save(truth, folder / "truth.pt")
    whole = {
        name: {n: x.clone() for n, x in model.state_dict().items()}
        for name, model in trained.state.whole({"raw": trained.state.model})
    }
    report["whole"] = same(whole["raw"], joined(trained)["model"])
    report["images"] = [
        np.stack([np.asarray(x) for x in model.generate([0, 1], seed=0, num_inference_steps=[2, 2])])
        .sum()
        .item()
        for _, model in trained.state.whole({"raw": trained.state.model})
    ]


def check_loading(world: World, report: dict, folder) -> None:
    """What two processes wrote, and the single file that was made of it, are read, and written again."""
    if world.is_main and not (folder / "single").exists():
        convert.main([str(folder / "sharded"), str(folder / "single"), "--single"])
    distributed.barrier()
    truth = torch.load(folder / "truth.pt")
    for name, how in (("sharded", "sharded"), ("single", "sharded"), ("sharded", "ddp")):
        loaded, said = Trained("guided", world, how), []
        loaded.state.begin(str(folder / name), None, None, said.append)
        report[f"loaded {name} by {how}"] = loaded.state.step, same(joined(loaded), truth)
        if name == "single":
            loaded.state.save(folder / f"again{world.size}", 2, None)
            report["said"] = said


def work(rank: int, size: int, folder, steps: int = STEPS) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{size}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    world, report = World(rank, size, rank), {}
    check_training(world, report, steps)
    if steps == STEPS and size == 2:
        check_bad_step(world, report)
        check_few(world, report)
        check_bfloat16(world, report)
        check_full_disk(world, report, folder / "full")
        check_saving(world, report, folder)
    if steps == STEPS:
        check_loading(world, report, folder)
    (folder / f"report{size}-{rank}.json").write_text(json.dumps(report))
    distributed.destroy_process_group()


def launch(size: int, folder, *more, work=work) -> list[dict]:
    processes = [forkserver.Process(target=work, args=(rank, size, folder, *more)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
    return [json.loads((folder / f"report{size}-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sharding")
    (made / "sharded").mkdir()
    for size in (2, 4):
        (made / f"again{size}").mkdir()
    return made


@pytest.fixture(scope="module")
def two(folder):
    return launch(2, folder)


@pytest.fixture(scope="module")
def four(folder, two):
    return launch(4, folder)


def assert_alike(reports: list[dict], kind: str) -> None:
    for report in reports:
        ddp, sharded = np.array(report[kind]["losses"])  # and norms of gradients
        print(kind, len(reports), "processes: relative differences", np.abs(sharded / ddp - 1).max(0))
        np.testing.assert_allclose(sharded, ddp, rtol=2e-5)


@TWO_AND_FOUR
@pytest.mark.parametrize("kind", ["ar", "mar", "guided"])
def test_losses_and_gradients_follow_those_of_ddp(request, size, kind):
    assert_alike(request.getfixturevalue(size), kind)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_gradients_follow_those_of_ddp_for_50_steps(tmp_path, size):
    reports = launch(size, tmp_path, 50)
    for kind in ("ar", "mar", "guided"):
        assert_alike(reports, kind)


@TWO_AND_FOUR
@pytest.mark.parametrize("kind", ["ar", "mar", "guided"])
def test_a_process_keeps_its_part_of_weights_gradients_moments_and_average(request, size, kind):
    reports = request.getfixturevalue(size)
    for report in reports:
        whole, part = report[kind]["bytes"]
        print(whole, part, report[kind]["gradients"])
        for name in whole:
            assert part[name] <= 1.1 * whole[name] / len(reports)
        assert report[kind]["gradients"] <= 1.1 * whole["weights"] / len(reports)


def test_a_loss_that_is_not_finite_on_one_process_changes_no_weight_on_any(two):
    for report in two:
        assert not np.isfinite(report["bad step"]["norm"])
        assert report["bad step"]["same"]
        assert np.isfinite(report["after"]).all()


def test_a_level_that_few_patches_of_a_process_reach_gets_the_mean_gradient(two):
    assert [report["few"] < 1e-6 for report in two] == [True, True]


def test_in_bfloat16_losses_are_about_those_of_ddp_and_weights_stay_float32(two):
    for report in two:
        ddp, sharded = np.array(report["bfloat16"])
        np.testing.assert_allclose(sharded, ddp, rtol=0.01)
        assert report["kept in"] == ["torch.float32"]


def test_on_a_full_disk_the_oldest_checkpoint_makes_room(two):
    """At the end at once; in between for the next one, because the weights have changed."""
    for report in two:
        *before, lost, last = report["errors"]
        assert before == [None] * 4
        assert lost.endswith(
            "step 4 could not be written (No space left on device); checkpoint-00000003.pth is whole"
        )
        assert last is None
        assert report["left"] == ["checkpoint-00000005.pth", "checkpoint-00000006.pth"]


def test_a_checkpoint_is_that_of_its_step_though_training_went_on(two, folder):
    for report in two:
        assert (report["error"], report["error of the end"]) == (None, None)
    content, truth = checkpoint.load(folder / "sharded" / checkpoint.NAME), torch.load(folder / "truth.pt")
    assert content["step"] == 3
    assert same(
        {"model": content["model"], "model_ema": content["model_ema"]},
        {k: truth[k] for k in ("model", "model_ema")},
    )
    moments = {
        f"{i} {name}": x for i, kept in content["optimizer"]["state"].items() for name, x in kept.items()
    }
    assert same(moments, truth["moments"])


def test_all_processes_draw_images_with_all_weights(two):
    assert two[0]["whole"]
    assert two[0]["images"] == two[1]["images"] != [0]


@TWO_AND_FOUR
@pytest.mark.parametrize("what", ["sharded by sharded", "single by sharded", "sharded by ddp"])
def test_any_number_of_processes_reads_it_bit_for_bit(request, what, size):
    reports = request.getfixturevalue(size)
    assert [report[f"loaded {what}"] for report in reports] == [[3, True]] * len(reports)


def test_one_process_reads_it_bit_for_bit_and_says_so(two, folder):
    alone, said = Trained("guided", World(), "alone"), []
    alone.state.begin(str(folder / "sharded"), None, None, said.append)
    assert same(joined(alone), torch.load(folder / "truth.pt"))
    assert "was written with processes 2, now 1; shard True, now False" in said[0]


@TWO_AND_FOUR
def test_made_a_single_file_and_back_nothing_changes(request, folder, tmp_path, size):
    reports = request.getfixturevalue(size)
    convert.main([str(folder / "single"), str(tmp_path), "--sharded"])
    assert (tmp_path / "checkpoint-00000003.shards").is_dir()
    places = folder / "sharded", folder / "single", tmp_path
    first, *others = (checkpoint.load(place / checkpoint.NAME) for place in places)
    assert (
        torch.load(folder / "single" / checkpoint.NAME, weights_only=True)["model"].keys()
        == first["model"].keys()
    )
    for other in others:
        assert same(first, other)
    assert same(
        first["optimizer"], checkpoint.load(folder / f"again{len(reports)}" / checkpoint.NAME)["optimizer"]
    )


class Evil:
    def __reduce__(self):
        return print, ("the file ran code",)


def copied(folder, tmp_path):
    for path in (folder / "sharded").rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(folder / "sharded")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "checkpoint-00000003.pth", tmp_path / "checkpoint-00000003.shards"


@contextlib.contextmanager
def changed(path, files: dict):
    """Gives the parts of the first tensor to change. `files` are added to those that the checkpoint names."""
    content = torch.load(path, weights_only=True)
    content["shards"]["files"] |= files
    yield next(iter(content["shards"]["tensors"].values()))[2]
    torch.save(content, path)
    checkpoint.sidecar(path).unlink(missing_ok=True)


def test_the_list_that_could_run_code_is_not_read(two, folder, tmp_path, capfd):
    path, shards = copied(folder, tmp_path)
    (shards / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert checkpoint.load(path)["step"] == 3
    assert "ran code" not in capfd.readouterr().out


ODD = (
    "a file elsewhere",
    "a file without a hash",
    "a device",
    "beyond the end",
    "a compressed member",
    "no numbers",
)


def odd_places(shards) -> dict:
    """By what is odd: a changed part, the files that the checkpoint names too, and the error."""
    with zipfile.ZipFile(shards / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    (shards / "zero").symlink_to("/dev/zero")
    size, digest = (shards / "bomb").stat().st_size, sha256(shards / "bomb")
    return {
        "a file elsewhere": (("../other", 0, 9), {"../other": 64 * "0"}, "in a file that is none of its own"),
        "a file without a hash": (("bomb", 0, 9), {}, "in a file that is none of its own"),
        "a device": (("zero", 0, 9), {"zero": 64 * "0"}, "zero: no such file"),
        "beyond the end": (("bomb", 0, 10**12), {"bomb": digest}, "bomb: cut short"),
        "a compressed member": (("bomb", 0, size), {"bomb": digest}, "refused, it has a compressed member"),
        "no numbers": (("bomb", None, "x"), {"bomb": digest}, "cannot be read"),
    }


@pytest.mark.parametrize("what", ODD)
def test_a_part_in_an_odd_place_is_refused(two, folder, tmp_path, what):
    path, shards = copied(folder, tmp_path)
    place, files, error = odd_places(shards)[what]
    with changed(path, files) as parts:
        parts[0] = (*parts[0][:2], *place)
    with pytest.raises(UserError, match=error):
        checkpoint.load(path)


def test_a_tensor_that_lacks_a_part_is_refused(two, folder, tmp_path):
    path, _ = copied(folder, tmp_path)
    with changed(path, {}) as parts:
        del parts[0]
    with pytest.raises(UserError, match=r"damaged, a part of model/\S+ is missing"):
        checkpoint.load(path)


def test_an_evaluation_reads_no_moments(two, folder):
    content = checkpoint.load(folder / "sharded" / checkpoint.NAME, optimizer=False)
    assert "optimizer" not in content
    assert same(content["model"], checkpoint.load(folder / "sharded" / checkpoint.NAME)["model"])


@pytest.mark.parametrize("what", ["a flipped bit", "a missing file", "a missing folder"])
def test_damage_is_one_line_that_names_the_folder(two, folder, tmp_path, what):
    path, shards = copied(folder, tmp_path)
    part = shards / "__1_0.distcp"
    if what == "a flipped bit":
        damaged = bytearray(part.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        part.write_bytes(damaged)
    elif what == "a missing file":
        part.unlink()
    else:
        shards.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert str(error.value).startswith(f"{shards}: ")
    assert "\n" not in str(error.value)


def test_what_only_this_process_knows_to_have_failed_ends_it():
    """The others would wait for it otherwise."""
    from util.run.sharding import Saver

    saver = object.__new__(Saver)
    saver.copied, saver.future = None, Future()
    saver.future.set_exception(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        saver.wait()


def check_stall(rank: int, size: int, folder) -> None:
    """Steps of a model of 37 million weights, while none and while a checkpoint is written."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    large = dict(embed_dim_list=[512, 256, 64], num_blocks_list=[10, 4, 2], num_heads_list=[8, 4, 2])
    trained, seconds = Trained("guided", World(rank, size, rank), "sharded", accum_iter=8, **large), {}

    def timed(name: str, call) -> None:
        began = time.perf_counter()
        call()
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    for number in range(5):
        if number in (1, 3):
            timed("save", lambda: trained.state.save(folder, 2, None, final=False))
        timed("step while saving" if number in (1, 3) else "step", trained.step)
        if number in (1, 3):
            timed("rest of saving", lambda: trained.state.finish(folder))
    weights = sum(p.numel() for p in trained.state.model.parameters())
    (folder / f"report{size}-{rank}.json").write_text(json.dumps({"weights": weights, **seconds}))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_saving_holds_up_training_for_less_than_a_tenth_of_a_step(tmp_path):
    """The first checkpoint also allocates the memory for the copy."""
    for report in launch(2, tmp_path, work=check_stall):
        print(report)
        assert report["save"][1] < 0.1 * min(report["step"][1:])


def resume(rank: int, size: int, folder, store, steps: int) -> None:
    """Goes on to step `steps`, with a checkpoint after each."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    trained = Trained("ar", World(rank, size, rank), "sharded")
    trained.state.begin(str(folder), folder, Namespace(), print)
    while trained.state.step < steps:
        trained.step()
        assert trained.state.save(folder, 2, None, final=trained.state.step == steps) is None
    distributed.destroy_process_group()


def begin(folder, steps: int) -> list:
    folder.mkdir(exist_ok=True)
    store = folder.with_name(f"store{time.monotonic_ns()}")
    processes = [forkserver.Process(target=resume, args=(rank, 2, folder, store, steps)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.faults
def test_killed_20_times_a_sharded_run_ends_like_an_uninterrupted_one(tmp_path):
    kill_often(tmp_path, 20)


def kill_often(tmp_path, kills: int) -> None:
    rng, in_a_write = random.Random(0), 0
    runs, folder = begin(tmp_path / "whole", 2 * kills), tmp_path / "killed"
    for run in runs:
        run.join(600)
    newest = lambda: max((path.name for path in folder.glob("checkpoint-0*.pth")), default="")  # noqa: E731
    for number in range(kills):
        before, runs = newest(), begin(folder, 2 * kills)
        while newest() == before:
            assert runs[0].is_alive()
            time.sleep(0.002)
        time.sleep(rng.random() * 0.5)
        for run in runs:
            run.kill()
            run.join()
        in_a_write += not all(path.with_suffix(".pth").exists() for path in folder.glob("*.shards"))
        in_a_write += any(folder.glob("*.tmp"))
        print(number, "killed,", sorted(path.name for path in folder.glob("checkpoint-0*")), flush=True)
        assert checkpoint.load(folder / checkpoint.NAME)["step"] > number
    for run in begin(folder, 2 * kills):
        run.join(600)
    print(f"{kills} kills of two processes, {in_a_write} of them during a write")
    killed, whole = (checkpoint.load(tmp_path / name / checkpoint.NAME) for name in ("killed", "whole"))
    assert killed["step"] == whole["step"] == 2 * kills
    assert all(same(killed[key], whole[key]) for key in ("model", "model_ema", "optimizer", "random"))
