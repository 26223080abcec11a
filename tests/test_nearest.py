import sys

import pytest
import torch
from PIL import Image
from test_losses import random_weights, write_files
from tiny_runs import SIZE, write_first_stage, write_prior

import eval as evaluation
import nearest as program
import run_folder
from data import Signs
from distributed import UserError
from losses import LPIPS
from nearest import AllPairs, Nearest, nearest_pictures, nearest_table, show_nearest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return random_weights("squeeze")


@pytest.fixture
def run(tmp_path):
    _, parent = write_first_stage(tmp_path)
    write_prior(tmp_path, parent)
    return tmp_path


def test_all_pairs_have_the_distance_that_lpips_gives_each(weights):
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(3, 3, 32, 32) * 2 - 1
    pairs, lpips = AllPairs("squeeze", weights), LPIPS("squeeze", weights)
    with torch.no_grad():
        distances = pairs.between(pairs.features_of(a), pairs.features_of(b))
        for i in range(2):
            for j in range(3):
                expected = lpips(a[i:i + 1], b[j:j + 1]).item()
                assert distances[i, j].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_the_nearest_are_those_of_a_sort_whatever_the_batches(batch_size):
    distances = (torch.rand(3, 50) * 8).round()                    # with many ties
    nearest = Nearest(3, count=5)
    for start in range(0, 50, batch_size):
        nearest.offer(distances[:, start:start + batch_size],
                      range(start, min(start + batch_size, 50)))
        assert all(len(best) <= 5 for best in nearest.best)        # memory does not grow
    for best, row in zip(nearest.best, distances.tolist()):
        assert best == sorted(zip(row, range(50)))[:5]


def test_the_best_of_several_processes_are_the_best_of_all(monkeypatch):
    one, two = Nearest(2, count=2), Nearest(2, count=2)
    one.offer(torch.tensor([[1.0, 4.0], [9.0, 8.0]]), [0, 1])
    two.offer(torch.tensor([[2.0, 3.0], [7.0, 9.0]]), [2, 3])
    monkeypatch.setattr(program, "gather_objects", lambda best: [best, two.best])
    one.over_ranks()
    assert one.best == [[(1.0, 0), (2.0, 2)], [(7.0, 2), (8.0, 1)]]


def test_a_training_picture_finds_itself(weights):
    signs = Signs("train", SIZE)
    (pictures,) = program.originals(signs, 3, 3, CPU)
    nearest = nearest_pictures(AllPairs("squeeze", weights), pictures.x[[2, 0]], signs, 12, 5, CPU)
    assert [best[0] for best in nearest] == [(0.0, 2), (0.0, 0)]
    assert all(len(best) == 10 for best in nearest)
    assert all(index < 12 for best in nearest for _, index in best)


def test_the_program_shows_samples_and_neighbours(run, weights, monkeypatch, capsys):
    write_files(run, "squeeze", weights)
    monkeypatch.setattr(sys, "argv", ["eval.py", str(run), "--nearest", "--lpips", "squeeze",
                                      "--weights", str(run), "-n", "11", "--steps", "2",
                                      "--device", "cpu"])
    evaluation.main()
    picture = Image.open(run / "nearest.png")
    assert picture.width > 11 * 128
    assert picture.height > 8 * 128
    printed = capsys.readouterr().out
    assert "by LPIPS (squeeze)" in printed
    assert "LPIPS of the nearest" in printed


def test_as_many_pictures_are_looked_at_as_the_prior_has_learnt(run, weights, monkeypatch):
    looked_at = []

    def note(lpips, samples, dataset, n, batch_size, device):
        looked_at.append(n)
        return [[(0.1, 0), (0.2, 1)]] * len(samples)

    monkeypatch.setattr(program, "SAMPLES", 1)
    monkeypatch.setattr(program, "nearest_pictures", note)
    monkeypatch.setattr(program, "AllPairs", lambda net, folder: LPIPS("squeeze", weights))
    show_nearest(run, CPU, steps=1)
    state = run_folder.load(run / "prior" / "last.pt")
    state["extra"]["maps"] = 123
    run_folder.save(run / "prior" / "last.pt", state)
    show_nearest(run, CPU, steps=1)
    show_nearest(run, CPU, steps=1, n=7)
    assert looked_at == [50_000, 123, 7]


def test_without_the_files_of_lpips_there_is_no_other_distance(run, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for flags, name in (("", "vgg16-397923af.pth"), ("--lpips alex", "alexnet-owt-7be5be79.pth")):
        monkeypatch.setattr(sys, "argv", ["eval.py", str(run), "--nearest", "--weights", str(run),
                                          *flags.split()])
        with pytest.raises(UserError, match=f"{name} is not in"):
            evaluation.main()
    assert not (run / "nearest.png").exists()
    monkeypatch.setattr(sys, "argv", ["eval.py", str(run), "--nearest", "--lpips", "none"])
    with pytest.raises(UserError, match="--nearest measures by LPIPS"):
        evaluation.main()


def test_a_run_that_is_not_there_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        show_nearest(tmp_path / "no" / "such" / "run" / "file", CPU)
    assert not list(tmp_path.iterdir())


def test_the_table_says_how_near_and_which():
    lines = nearest_table([[(0.25, 3), (0.5, 1)]]).split("\n")
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["0", "0.2500", "0.5000", "3, 1"]
