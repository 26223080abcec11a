"""What is measured of pictures, and how it adds up over bins and processes."""

import math

import pytest
import torch
from tiny_reports import assert_alike

import tally
from distributed import UserError
from fid import FeatureStatistics, inception_score
from masks import area_bucket, evaluation_mask
from metrics import pre_error, psnr_known, seam
from tally import FEATURES, REAL, Networks, Pictures, Tally, measure, open_networks, tally_batches

SIZE, CPU = 32, torch.device("cpu")
KEY = ("run", "asym")


def pictures(first, last, masks=True):
    """Pictures first..last-1 of a fixed set, with their evaluation masks."""
    generators = [torch.Generator().manual_seed(i) for i in range(first, last)]
    x = torch.stack([torch.rand(3, SIZE, SIZE, generator=g) * 2 - 1 for g in generators])
    mask = torch.stack([torch.tensor(evaluation_mask(SIZE, i))[None].float()
                        for i in range(first, last)]) if masks else None
    return Pictures(list(range(first, last)), x, mask)


def fake_inception(images):
    """(features, logits) that depend on the images, without the network's weight file."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(images[0].numel(), FEATURES, generator=generator) / 40
    features = (images.flatten(1) @ weight).relu()
    return features, features[:, :1008] * 2


def blurred(batch):
    """A decoder that is wrong everywhere, by another amount in each picture."""
    shift = 0.05 * torch.tensor(batch.index)[:, None, None, None]
    return {KEY: (batch.x * 0.9 - shift, 0.5)}


def counted(batches, n, **networks):
    return tally_batches(batches, blurred, n, Networks(notes={}, **networks))


def test_a_rows_figures_are_those_of_a_loop_over_its_pictures():
    row = counted([pictures(0, 4), pictures(4, 7)], 7).row(KEY, "all")
    every = pictures(0, 7)
    x_hat, _ = blurred(every)[KEY]
    for name, formula in (("pre_error", pre_error), ("psnr_known", psnr_known), ("seam", seam)):
        expected = [formula(x_hat[i:i + 1], every.x[i:i + 1], every.mask[i:i + 1]).item()
                    for i in range(7)]
        assert row[name] == pytest.approx(sum(expected) / 7, rel=1e-6)
    assert row["n"] == 7
    assert row["images_per_s"] == pytest.approx(7 / 1.0)         # two batches of half a second
    assert row["lpips"] is row["clip_score"] is row["fid"] is row["is_mean"] is None


def test_bins_hold_the_pictures_of_their_area_and_add_up_to_all():
    whole = counted([pictures(0, 12)], 12)
    areas = [area_bucket(evaluation_mask(SIZE, i)) for i in range(12)]
    bins = [name for name in whole.buckets(KEY) if name != "all"]
    assert {name: whole.row(KEY, name)["n"] for name in bins} == {
        name: areas.count(name) for name in set(areas)}
    assert len(bins) > 2
    mean = sum(whole.row(KEY, name)["n"] * whole.row(KEY, name)["pre_error"] for name in bins) / 12
    assert whole.row(KEY, "all")["pre_error"] == pytest.approx(mean, rel=1e-9)


def test_fid_of_a_bin_is_that_of_its_pictures_against_the_same_originals():
    whole = counted([pictures(0, 5), pictures(5, 16)], 16, inception=fake_inception)
    every = pictures(0, 16)
    x_hat, _ = blurred(every)[KEY]
    for name in whole.buckets(KEY):
        rows = [i for i, own in enumerate(every.buckets()) if name in ("all", own)]
        ours, real = FeatureStatistics(FEATURES), FeatureStatistics(FEATURES)
        ours.update(fake_inception(x_hat.clamp(-1, 1))[0][rows])
        real.update(fake_inception(every.x)[0][rows])
        found = whole.row(KEY, name)["fid"]
        if len(rows) < 2:
            assert found is None
        else:
            assert found == pytest.approx(ours.frechet(real), rel=1e-6)
            assert found > 0.01


def test_the_inception_score_is_of_all_pictures_in_their_order_whatever_the_batches():
    order = [pictures(8, 20), pictures(0, 3), pictures(3, 8)]
    row = counted(order, 20, inception=fake_inception).row(KEY, "all")
    x_hat, _ = blurred(pictures(0, 20))[KEY]
    mean, std = inception_score(fake_inception(x_hat.clamp(-1, 1))[1])
    assert row["is_mean"] == pytest.approx(mean, rel=1e-6)
    assert row["is_std"] == pytest.approx(std, rel=1e-4)
    assert counted(order, 20).row(KEY, "all")["is_mean"] is None


def test_shares_of_two_processes_merge_to_the_whole(monkeypatch):
    whole = counted([pictures(0, 9)], 9, inception=fake_inception)
    shares = [counted([pictures(0, 2), pictures(5, 9)], 9, inception=fake_inception),
              counted([pictures(2, 5)], 9, inception=fake_inception)]
    monkeypatch.setattr(tally, "gather_objects", lambda own: shares)
    merged = shares[0].over_ranks()
    for name in whole.buckets(KEY):
        assert_alike(merged.row(KEY, name), whole.row(KEY, name), 1e-6)
    assert merged.cell(REAL, "all").n == 9


def test_a_picture_without_a_value_is_left_out_of_that_mean_only():
    batch = pictures(0, 3)
    batch.mask[1] = 1                                            # nothing known: no error, no seam
    row = counted([batch], 3).row(KEY, "all")
    x_hat, _ = blurred(batch)[KEY]
    expected = pre_error(x_hat, batch.x, batch.mask)[[0, 2]].mean().item()
    assert row["pre_error"] == pytest.approx(expected, rel=1e-9)
    assert row["n"] == 3


def test_an_infinite_mean_and_a_missing_one_are_none():
    batch = pictures(0, 2)
    exact = tally_batches([batch], lambda p: {KEY: (p.x, 0.1)}, 2, Networks(notes={}))
    assert exact.row(KEY, "all")["psnr_known"] is None           # infinite
    assert exact.row(KEY, "all")["pre_error"] == 0
    batch.mask[:] = 1
    assert counted([batch], 2).row(KEY, "all")["seam"] is None   # nowhere defined


def test_pictures_without_masks_have_one_bin_and_no_known_pixels():
    whole = counted([pictures(0, 3, masks=False)], 3, inception=fake_inception,
                    lpips=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    row = whole.row(KEY, "all")
    assert whole.buckets(KEY) == ["all"]
    assert row["pre_error"] is row["psnr_known"] is row["seam"] is None
    assert row["lpips"] > 0
    assert row["fid"] > 0
    assert row["n"] == 3


def test_lpips_sees_whole_pictures_clamped():
    def distance(a, b):
        assert a.abs().max() <= 1
        return (a - b).abs().mean((1, 2, 3))

    batch = pictures(0, 2)
    x_hat = torch.where(batch.mask == 1, 3.0, batch.x)           # wrong in the hole alone
    values = measure(x_hat, batch, Networks(distance, notes={}))
    assert (values["lpips"] > 0).all()
    assert (values["pre_error"] == 0).all()


def test_the_clip_score_compares_the_hole_with_its_reference():
    class Encoder:
        proj = torch.zeros(1)                                    # tells the device

        def __call__(self, images):
            return images.flatten(1)[:, :8]

    batch = pictures(0, 2)
    networks = Networks(clip=Encoder(), notes={})
    assert "clip_score" not in measure(batch.x, batch, networks)  # no references
    batch.refs = [torch.rand(3, 20, 24), torch.rand(3, 9, 9)]
    values = measure(batch.x, batch, networks)["clip_score"]
    assert values.shape == (2,)
    assert values.dtype == torch.float64
    assert values.isfinite().all()


def test_outputs_that_are_not_finite_end_the_evaluation():
    def broken(batch):
        return {KEY: (batch.x * math.nan, 0.1)}

    with pytest.raises(UserError, match="asym of run gives values that are not finite"):
        tally_batches([pictures(0, 1)], broken, 1, Networks(notes={}))


def test_a_network_whose_file_is_missing_leaves_its_column_empty_and_says_what_goes_where(
        tmp_path, monkeypatch):
    def offline(address, *args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    networks = open_networks(CPU, tmp_path, "vgg", clip="ViT-B/32")
    assert networks.lpips is networks.inception is networks.clip is networks.lpips_net is None
    for column, file in (("lpips", "vgg16-397923af.pth"), ("clip_score", "ViT-B-32.pt"),
                         ("fid", "pt_inception-2015-12-05-6726825d.pth")):
        note = networks.notes[column]
        assert note.startswith(f"n/a: {file} is not in {tmp_path}")
        assert f"{file} and put it there" in note
    assert networks.notes["fid"] == networks.notes["is_mean"]
    with pytest.raises(UserError, match=r"vgg16-397923af.pth is not in"):
        open_networks(CPU, tmp_path, "vgg", asked=True)


def test_a_process_does_not_look_for_a_file_that_the_first_one_could_not_get(monkeypatch):
    monkeypatch.setattr(tally, "rank", lambda: 1)
    monkeypatch.setattr(tally, "gather_objects", lambda own: ["it is not to be had", own])
    monkeypatch.setattr(tally, "InceptionV3", lambda weights: pytest.fail("looked for"))
    networks = open_networks(CPU, lpips="none")
    assert networks.inception is None
    assert networks.notes["fid"] == "n/a: it is not to be had"


def test_what_was_not_asked_for_says_so(tmp_path):
    notes = open_networks(CPU, tmp_path, "none", asked=True, fid=False).notes
    assert notes["lpips"] == "not computed: --lpips none"
    assert notes["fid"] == "not computed: --no-fid"
    assert notes["clip_score"].startswith("not computed: ")
    notes = open_networks(CPU, tmp_path, "none", fid=False).notes
    assert notes["lpips"].startswith("not computed: the run has --perceptual none")


def test_a_tally_of_nothing_merges_like_zero():
    whole = counted([pictures(0, 2)], 2)
    empty = Tally(2)
    empty.merge(whole)
    assert empty.row(KEY, "all") == whole.row(KEY, "all")
