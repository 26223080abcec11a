"""What is measured of images, by several decoders, and the means of the one table."""

import math

import numpy as np
import pytest
import torch
from tiny_reports import assert_alike
from tiny_runs import SIZE, write_decoder, write_first_stage, write_run

import metrics
from convert import load_model
from data import Batch
from distributed import UserError
from fid import frechet_distance, inception_score, moments
from masks import area_bucket, evaluation_mask
from metrics import (
    REAL,
    Networks,
    decode_all,
    describe,
    differences,
    first_stage_of,
    measure,
    open_networks,
    over_ranks,
    pre_error,
    psnr_known,
    report_rows,
    seam,
    summary,
)

CPU, KEY = torch.device("cpu"), ("run", "asym")


def example(batch=3, size=6):
    x_hat, x = torch.rand(2, batch, 3, size, size) * 2 - 1
    mask = (torch.rand(batch, 1, size, size) < 0.5).float()
    return x_hat, x, mask


def by_loops(x_hat, x, mask):
    """(pre_error, seam) of one image, pixel by pixel."""
    a, b = ((np.clip(image.numpy().astype(float), -1, 1) + 1) / 2 for image in (x_hat, x))
    errors, steps, (height, width) = [], [], mask.shape[1:]
    for i in range(height):
        for j in range(width):
            if mask[0, i, j] == 0:
                errors += [(a[c, i, j] - b[c, i, j]) ** 2 for c in range(3)]
            for k, n in ((i + 1, j), (i, j + 1)):
                if k < height and n < width and mask[0, i, j] != mask[0, k, n]:
                    steps += [abs((a[c, i, j] - a[c, k, n]) - (b[c, i, j] - b[c, k, n]))
                              for c in range(3)]
    return np.mean(errors), np.mean(steps)


def test_pre_error_and_seam_equal_loops_over_pixels():
    x_hat, x, mask = example()
    errors, seams = zip(*(by_loops(*image) for image in zip(x_hat * 1.5, x, mask)))
    assert pre_error(x_hat * 1.5, x, mask).tolist() == pytest.approx(errors, rel=1e-12)
    assert seam(x_hat * 1.5, x, mask).tolist() == pytest.approx(seams, rel=1e-12)


def test_a_shift_of_a_tenth_in_0_1_is_an_error_of_a_hundredth_and_20_db():
    x = torch.zeros(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    assert pre_error(x + 0.2, x, mask).item() == pytest.approx(0.01, rel=1e-6)
    assert psnr_known(x + 0.2, x, mask).item() == pytest.approx(20, rel=1e-6)


def test_an_exact_copy_even_if_only_when_clamped_has_no_error_no_seam_and_infinite_psnr():
    _, x, mask = example()
    x = x.sign()
    assert pre_error(x * 7, x, mask).tolist() == seam(x * 7, x, mask).tolist() == [0, 0, 0]
    assert psnr_known(x, x, mask).tolist() == [math.inf] * 3


def test_an_image_without_known_pixels_is_nan_and_leaves_its_neighbours_alone():
    x_hat, x, mask = example()
    mask[1] = 1
    for metric in (pre_error, psnr_known, seam):
        value = metric(x_hat, x, mask)
        assert value.isnan().tolist() == [False, True, False]


def test_errors_as_small_as_the_papers_keep_their_digits_at_full_size():
    x = torch.rand(1, 3, 256, 256) * 1.9 - 0.95
    mask = torch.zeros(1, 1, 256, 256)
    x_hat = x + 2 * math.sqrt(2.1e-5) * torch.randn(1, 3, 256, 256).sign()
    assert pre_error(x_hat, x, mask).item() == pytest.approx(2.1e-5, rel=1e-4)


def test_seam_is_the_brightness_by_which_a_patch_differs_from_what_is_around_it():
    flat, mask = torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    assert seam(flat + 0.4 * mask, flat, mask).item() == pytest.approx(0.2, rel=1e-6)
    assert seam(flat - 0.4 * mask, flat, mask).item() == pytest.approx(0.2, rel=1e-6)
    assert seam(flat + 0.4, flat, mask).item() == pytest.approx(0, abs=1e-9)


def test_blur_and_a_brighter_hole_do_not_cancel_in_the_seam():
    x, mask = torch.rand(1, 3, 32, 32) - 0.5, torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    blurred, outside = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False), 1 - mask

    def lost(x_hat):
        """How much smaller the steps across the border have become, their signs left out."""
        return sum((mask.diff(dim=axis).abs() * (x.diff(dim=axis).abs() - x_hat.diff(
            dim=axis).abs())).sum() for axis in (2, 3))

    low, high = 0.0, 1.0                                         # brightness that hides the blur
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if lost(blurred + middle * mask) > 0 else (low, middle)
    both = blurred + low * mask
    assert lost(blurred) > 50
    assert lost(both).abs() < 1e-2                               # on the whole no step is lost
    assert seam(both, x, mask) > seam(blurred, x, mask) > 0.05
    assert seam(torch.where(outside == 1, x, both), x, mask) > 0.05


def test_half_precision_inputs_are_measured_in_float64():
    x_hat, x, mask = example()
    x_hat, x = x_hat.bfloat16(), x.bfloat16()
    for metric in (pre_error, psnr_known, seam):
        assert metric(x_hat, x, mask.bfloat16()).dtype == torch.float64
        assert torch.equal(metric(x_hat, x, mask), metric(x_hat.float(), x.float(), mask))


@pytest.fixture
def models(tmp_path):
    """An add and a concat decoder on one first stage, as for Table 3."""
    write_run(tmp_path / "add")
    _, parent = write_first_stage(tmp_path / "add")
    write_decoder(tmp_path / "concat", parent, blend="concat", vqgan=str(tmp_path / "add"))
    return {name: load_model(tmp_path / name) for name in ("add", "concat")}


def photos_and_masks():
    x, mask = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.zeros(2, 1, SIZE, SIZE)
    mask[:, :, 10:] = 1
    return x, mask


def test_every_decoder_reads_the_same_latents(models):
    (x, mask), model = photos_and_masks(), models["concat"]
    with torch.no_grad():
        z = model.encode(x)
        outputs = {key: x_hat for key, (x_hat, _) in decode_all(models, z, x, mask).items()}
        assert torch.equal(outputs[None, "vanilla"], model.first_stage.decode(z))
        assert torch.equal(outputs["concat", "asym"], model.decode(z, image=x, mask=mask))
        assert torch.equal(outputs["concat", "asym-nomask"], model.decode(z))
    assert torch.equal(outputs[None, "paste"][:, :, :10], x[:, :, :10])
    assert torch.equal(outputs[None, "paste"][:, :, 10:], outputs[None, "vanilla"][:, :, 10:])


def test_without_masks_only_what_needs_none_is_decoded(models):
    x, _ = photos_and_masks()
    with torch.no_grad():
        keys = set(decode_all(models, models["add"].encode(x), x))
    assert keys == {(None, "vanilla"), ("add", "asym-nomask"), ("concat", "asym-nomask")}


def test_a_first_stage_without_a_decoder_of_its_own_has_no_vanilla_rows(models):
    x, mask = photos_and_masks()
    for model in models.values():
        model.first_stage.decoder = None
    with torch.no_grad():
        outputs = decode_all(models, models["add"].encode(x), x, mask)
    assert {decoder for _, decoder in outputs} == {"asym", "asym-nomask"}


def test_the_vanilla_decoder_comes_from_whichever_run_has_one(models):
    models["add"].first_stage.decoder = None
    assert first_stage_of(models.values()) is models["concat"].first_stage


def pictures(first, last, masks=True):
    """Pictures first..last-1 of a fixed set, with their evaluation masks."""
    generators = [torch.Generator().manual_seed(i) for i in range(first, last)]
    x = torch.stack([torch.rand(3, SIZE, SIZE, generator=g) * 2 - 1 for g in generators])
    mask = torch.stack([torch.tensor(evaluation_mask(SIZE, i))[None].float()
                        for i in range(first, last)]) if masks else None
    return Batch(list(range(first, last)), x, mask)


FEATURES = 48                # instead of 2,048: a distance takes the cube of it


def fake_inception(images):
    """(features, logits) that depend on the images, without the network's weight file."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(images[0].numel(), FEATURES, generator=generator) / 40
    features = (images.flatten(1) @ weight).relu()
    return features, features * 2


def blurred(batch):
    """A decoder that is wrong everywhere, by another amount in each picture."""
    return batch.x * 0.9 - 0.05 * torch.tensor(batch.index)[:, None, None, None]


def tabulated(*batches, **networks):
    """The table of the originals and of `blurred`."""
    table, networks = [], Networks(**networks)
    for batch in batches:
        table += measure(batch.x, batch, networks, None, REAL)
        table += measure(blurred(batch), batch, networks, *KEY, seconds=0.5)
    return over_ranks(table)


def test_the_figures_are_those_of_a_loop_over_the_images():
    row = summary(tabulated(pictures(0, 4), pictures(4, 7)), *KEY)
    every = pictures(0, 7)
    for name, formula in (("pre_error", pre_error), ("psnr_known", psnr_known), ("seam", seam)):
        expected = [formula(blurred(every)[i:i + 1], every.x[i:i + 1], every.mask[i:i + 1]).item()
                    for i in range(7)]
        assert row[name] == pytest.approx(sum(expected) / 7, rel=1e-6)
    assert row["n"] == 7
    assert row["images_per_s"] == pytest.approx(7 / 1.0)         # two batches of half a second
    assert row["lpips"] is row["clip_score"] is row["fid"] is row["is_mean"] is None


def test_buckets_hold_the_images_of_their_area_and_add_up_to_all():
    rows = report_rows(tabulated(pictures(0, 12)), {"run": None})
    areas = [area_bucket(evaluation_mask(SIZE, i)) for i in range(12)]
    whole, *parts = rows
    assert {row["bucket"]: row["n"] for row in parts} == {
        name: areas.count(name) for name in set(areas)}
    assert len(parts) > 2
    assert (whole["bucket"], whole["decoder"]) == ("all", "asym")
    mean = sum(row["n"] * row["pre_error"] for row in parts) / 12
    assert whole["pre_error"] == pytest.approx(mean, rel=1e-9)


def slow_error(table, name):
    """The mean and its cluster-robust standard error by their definition, over pairs of images."""
    rows = [row for row in table if not math.isnan(row[name])]
    mean = sum(row[name] for row in rows) / len(rows)
    masks = {row["group"] for row in rows}
    total = sum((a[name] - mean) * (b[name] - mean) for a in rows for b in rows
                if a["group"] == b["group"])
    return mean, math.sqrt(len(masks) / (len(masks) - 1) * total) / len(rows)


def test_a_standard_error_is_the_usual_one_where_all_groups_are_distinct():
    values = np.random.default_rng(0).normal(3, 1, 50)
    expected = values.mean(), values.std(ddof=1) / 50 ** 0.5, np.median(values)
    assert describe(zip(values, range(50))) == pytest.approx(expected, rel=1e-12)


def test_copies_of_an_image_do_not_make_its_mean_more_certain():
    values = torch.randn(20).tolist()
    once, thrice = (describe(zip(n * values, n * [*range(20)])) for n in (1, 3))
    assert thrice == pytest.approx(once, rel=1e-9)
    assert describe(zip(3 * values, range(60)))[1] < 0.6 * once[1]           # taken as independent


def test_a_standard_error_is_the_deviation_of_means_of_redrawn_groups():
    rng = np.random.default_rng(0)
    groups = [1 + rng.normal() + 0.5 * rng.normal(size=rng.integers(1, 6)) for _ in range(300)]
    pairs = [(value, name) for name, group in enumerate(groups) for value in group]
    error = describe(pairs)[1]
    sums, sizes = np.array([[group.sum(), len(group)] for group in groups]).T
    drawn = rng.integers(0, 300, (4000, 300))                    # a bootstrap of whole groups
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    assert error == pytest.approx(means.std(), rel=0.05)
    naive = describe((value, place) for place, (value, _) in enumerate(pairs))[1]
    assert naive < 0.7 * error


def test_a_standard_error_needs_two_groups_and_finite_values_and_leaves_out_nan():
    assert describe(zip([1.0, 3.0], "aa")) == (2.0, None, 2.0)
    assert describe(zip([1.0, math.nan, 3.0], "abc")) == (2.0, 1.0, 2.0)
    assert describe([(math.nan, "a")]) == describe([]) == (None, None, None)
    assert describe(zip([1.0, 2.0, math.inf], "abc")) == (None, None, 2.0)


def test_rows_have_errors_clustered_by_equal_masks_and_medians():
    batch = pictures(0, 9)
    batch.mask[3:6] = batch.mask[2]                              # four images with one mask
    table = measure(blurred(batch), batch, Networks(), *KEY)
    row = summary(table, *KEY)
    for name in ("pre_error", "psnr_known", "seam"):
        assert [row[name], row[f"{name}_se"]] == pytest.approx(slow_error(table, name), rel=1e-9)
    assert row["pre_error_median"] == pytest.approx(
        np.median(pre_error(blurred(batch), batch.x, batch.mask)), rel=1e-12)
    assert row["lpips"] is row["lpips_se"] is None
    one = [row for row in table if row["group"] == table[2]["group"]]
    assert summary(one, *KEY)["pre_error_se"] is None            # a single mask
    exact = summary(measure(batch.x, batch, Networks(), *KEY), *KEY)
    assert exact["psnr_known"] is exact["psnr_known_se"] is exact["psnr_known_median"] is None
    assert exact["pre_error_se"] == 0


def test_masks_are_told_apart_by_their_pixels():
    batch = pictures(0, 3)
    batch.mask[1], batch.mask[2] = batch.mask[0], 1 - batch.mask[0]
    one, same, other = measure(batch.x, batch, Networks(), *KEY)
    assert one["group"] == same["group"] != other["group"]
    assert one["area"] + other["area"] == 1
    assert one["area"] == batch.mask[0].mean()


def test_differences_are_paired_image_by_image():
    batch, table = pictures(0, 8), []
    batch.mask = (torch.rand(batch.mask.shape) < 0.4).float()    # eight masks
    made = {(None, "vanilla"): blurred(batch), (None, "paste"): batch.x * 0.5,
            ("a", "asym"): batch.x * 0.8, ("a", "asym-nomask"): batch.x * 0.7,
            ("b", "asym"): batch.x * 0.8 + 0.01}
    for key, x_hat in made.items():
        table += measure(x_hat, batch, Networks(), *key)
    found = differences(over_ranks(table))
    assert [(row["run"], row["other_run"], row["other"]) for row in found] == [
        ("a", None, "vanilla"), ("a", None, "paste"), ("b", None, "vanilla"), ("b", None, "paste"),
        ("b", "a", "asym")]
    for row in found:
        ours, other = made[row["run"], "asym"], made[row["other_run"], row["other"]]
        for name, formula in (("pre_error", pre_error), ("seam", seam)):
            pairs = formula(ours, batch.x, batch.mask) - formula(other, batch.x, batch.mask)
            assert row[name] == pytest.approx(pairs.mean().item(), rel=1e-9)
            assert row[f"{name}_se"] == pytest.approx(pairs.std().item() / 8 ** 0.5, rel=1e-9)
        assert row["lpips"] is row["lpips_se"] is None
        assert row["n"] == 8
    alone = summary(table, "b", "asym")["pre_error_se"]
    assert found[-1]["pre_error_se"] < 0.5 * alone               # the images' own part is gone
    assert differences([row for row in table if row["decoder"] != "asym"]) == []


def test_fid_of_a_bucket_that_the_paper_prints_is_of_its_images_and_the_same_originals(
        monkeypatch):
    monkeypatch.setattr(metrics, "FEWEST_FOR_FID", 2)
    every = pictures(0, 16)
    table = tabulated(pictures(0, 5), pictures(5, 16), inception=fake_inception)
    own = [area_bucket(mask) for mask in every.mask]
    for name in ("all", "40-50"):
        rows = [i for i in range(16) if name in ("all", own[i])]
        ours = moments(fake_inception(blurred(every).clamp(-1, 1))[0][rows])
        real = moments(fake_inception(every.x)[0][rows])
        found = summary(table, *KEY, name)["fid"]
        assert found == pytest.approx(frechet_distance(*ours, *real), rel=1e-6)
        assert found > 0.01
    assert summary(table, *KEY, "20-30")["fid"] is None
    one = [row for row in table if row["index"] == 0]
    assert summary(one, *KEY)["fid"] is None                     # fewer than two


def test_fid_is_not_given_below_as_many_images_as_features(monkeypatch):
    assert metrics.FEWEST_FOR_FID == 2048
    table = tabulated(pictures(0, 5), inception=fake_inception)
    for fewest, found in ((6, False), (5, True)):
        monkeypatch.setattr(metrics, "FEWEST_FOR_FID", fewest)
        row = summary(table, *KEY)
        assert (row["fid"] is not None) == found
        assert row["is_mean"] is not None
    fewer = [row for row in table if (row["decoder"], row["index"]) != (REAL, 0)]
    assert summary(fewer, *KEY)["fid"] is None                   # too few originals


def test_the_inception_score_is_of_all_images_in_their_order_whatever_the_batches():
    batches = [pictures(8, 20), pictures(0, 3), pictures(3, 8)]
    row = summary(tabulated(*batches, inception=fake_inception), *KEY)
    mean, std = inception_score(fake_inception(blurred(pictures(0, 20)).clamp(-1, 1))[1])
    assert row["is_mean"] == pytest.approx(mean, rel=1e-6)
    assert row["is_std"] == pytest.approx(std, rel=1e-4)


def test_the_rows_of_two_processes_are_the_whole_table(monkeypatch):
    whole = tabulated(pictures(0, 9), inception=fake_inception)
    shares = [tabulated(pictures(0, 2), pictures(5, 9), inception=fake_inception),
              tabulated(pictures(2, 5), inception=fake_inception)]
    monkeypatch.setattr(metrics, "gather_objects", lambda own: shares)
    merged = over_ranks(shares[0])
    for a, b in zip(report_rows(merged, {"run": None}), report_rows(whole, {"run": None}),
                    strict=True):
        assert_alike(a, b, 1e-6)


def test_a_missing_an_infinite_and_an_undefined_value_are_none_and_the_others_count():
    batch = pictures(0, 3)
    batch.mask[1] = 1                                            # nothing known: no error, no seam
    row = summary(tabulated(batch), *KEY)
    expected = pre_error(blurred(batch), batch.x, batch.mask)[[0, 2]].mean().item()
    assert row["pre_error"] == pytest.approx(expected, rel=1e-9)
    assert row["n"] == 3
    row = summary(measure(batch.x, batch, Networks(), *KEY), *KEY)
    assert row["psnr_known"] is None                             # infinite
    assert row["pre_error"] == 0
    batch.mask[:] = 1
    assert summary(tabulated(batch), *KEY)["seam"] is None       # nowhere defined


class Distance:
    """In place of LPIPS."""

    least_side = 4

    def __call__(self, a, b):
        return (a - b).abs().mean((1, 2, 3))


def test_images_without_masks_have_one_bucket_and_no_known_pixels(monkeypatch):
    monkeypatch.setattr(metrics, "FEWEST_FOR_FID", 3)
    table = tabulated(pictures(0, 3, masks=False), inception=fake_inception,
                      lpips=Distance())
    (row,) = report_rows(table, {"run": None})
    assert (row["bucket"], row["n"]) == ("all", 3)
    assert row["pre_error"] is row["psnr_known"] is row["seam"] is None
    assert row["lpips"] > 0
    values = [row["lpips"] for row in table if row["decoder"] != REAL]
    assert row["lpips_se"] == pytest.approx(np.std(values, ddof=1) / 3 ** 0.5, rel=1e-9)
    assert row["fid"] > 0


def test_lpips_sees_whole_images_clamped():
    def distance(a, b):
        assert a.abs().max() <= 1
        return (a - b).abs().mean((1, 2, 3))

    distance.least_side, batch = 4, pictures(0, 2)
    x_hat = torch.where(batch.mask == 1, 3.0, batch.x)           # wrong in the hole alone
    for row in measure(x_hat, batch, Networks(distance), *KEY):
        assert row["lpips"] > 0
        assert row["pre_error"] == 0


def test_the_clip_score_compares_the_hole_with_its_reference():
    class Encoder:
        mean, size = torch.zeros(1), 24                          # mean tells the device

        def __call__(self, images):
            return images.flatten(1)[:, :8]

    batch, networks = pictures(0, 2), Networks(clip=Encoder())
    assert "clip_score" not in measure(batch.x, batch, networks, *KEY)[0]      # no references
    batch.refs = [torch.rand(3, 20, 24), torch.rand(3, 9, 9)]
    rows = measure(batch.x, batch, networks, *KEY)
    assert all(math.isfinite(row["clip_score"]) for row in rows)


def test_outputs_that_are_not_finite_end_the_evaluation():
    batch = pictures(0, 1)
    with pytest.raises(UserError, match="asym of run gives values that are not finite"):
        measure(batch.x * math.nan, batch, Networks(), *KEY)


def test_a_network_whose_file_is_missing_leaves_its_column_empty_and_says_what_goes_where(
        tmp_path, monkeypatch):
    def offline(address, *args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    networks = open_networks(CPU, tmp_path, "vgg", refs=True)
    assert networks.lpips is networks.inception is networks.clip is None
    for column, file in (("lpips", "vgg16-397923af.pth"),
                         ("fid", "pt_inception-2015-12-05-6726825d.pth")):
        assert networks.empty[column].startswith(f"n/a: {file} is not in {tmp_path}")
        assert f"{file} there" in networks.empty[column]
    assert networks.empty["fid"] == networks.empty["is_mean"]
    assert networks.empty["clip_score"] == "n/a: no image tower was given (--clip)"
    with pytest.raises(UserError, match=r"vgg16-397923af.pth is not in"):
        open_networks(CPU, tmp_path, "vgg", asked=True)


def test_a_process_does_not_look_for_a_file_that_the_first_one_could_not_get(monkeypatch):
    def refused(build):
        raise UserError("it is not to be had")

    monkeypatch.setattr(metrics, "on_rank0", refused)
    monkeypatch.setattr(metrics, "InceptionV3", lambda weights: pytest.fail("looked for"))
    networks = open_networks(CPU, lpips="none")
    assert networks.inception is None
    assert networks.empty["fid"] == "n/a: it is not to be had"


def test_every_process_opens_the_networks_after_the_first_one(monkeypatch):
    monkeypatch.setattr(metrics, "on_rank0", lambda build: None)             # as on rank 1
    monkeypatch.setattr(metrics, "InceptionV3", lambda weights: torch.nn.Identity())
    assert isinstance(open_networks(CPU, lpips="none").inception, torch.nn.Identity)


def test_what_was_not_asked_for_says_so(tmp_path):
    reasons = open_networks(CPU, tmp_path, "none", asked=True, fid=False).empty
    assert reasons["lpips"] == "not computed: --lpips none"
    assert reasons["fid"] == "not computed: --no-fid"
    assert reasons["clip_score"].startswith("not computed: ")
    reasons = open_networks(CPU, tmp_path, "none", fid=False).empty
    assert reasons["lpips"].startswith("not computed: the run has --perceptual none")
