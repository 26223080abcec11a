"""What is measured of pictures, by several decoders, and how it adds up over bins and processes."""

import math

import pytest
import torch
from tiny_reports import assert_alike
from tiny_runs import SIZE, write_decoder, write_first_stage, write_run

import metrics
from distributed import UserError, exact_float32
from eval import open_runs
from fid import FeatureStatistics, inception_score
from masks import area_bucket, evaluation_mask
from metrics import (
    REAL,
    Networks,
    Pictures,
    Tally,
    decode_all,
    first_stage_of,
    measure,
    open_networks,
    pre_error,
    psnr_known,
    seam,
    tally_batches,
)

CPU, KEY = torch.device("cpu"), ("run", "asym")


# -- known pixels ----------------------------------------------------------------------------------


def example(batch=3, size=6):
    x_hat, x = torch.rand(2, batch, 3, size, size) * 2 - 1
    mask = (torch.rand(batch, 1, size, size) < 0.5).float()
    return x_hat, x, mask


def unit(value):
    return (min(max(value, -1.0), 1.0) + 1) / 2


def pre_error_by_loops(x_hat, x, mask):
    total = count = 0
    for i in range(mask.shape[1]):
        for j in range(mask.shape[2]):
            if mask[0, i, j] == 0:
                for c in range(3):
                    total += (unit(float(x_hat[c, i, j])) - unit(float(x[c, i, j]))) ** 2
                    count += 1
    return total / count


def seam_by_loops(x_hat, x, mask):
    height, width = mask.shape[1:]
    ours, original = [], []
    for i in range(height):
        for j in range(width):
            for k, n in ((i + 1, j), (i, j + 1)):
                if k < height and n < width and mask[0, i, j] != mask[0, k, n]:
                    for c in range(3):
                        for image, steps in ((x_hat, ours), (x, original)):
                            steps.append(abs(unit(float(image[c, i, j]))
                                             - unit(float(image[c, k, n]))))
    return sum(ours) / len(ours) - sum(original) / len(original)


def test_pre_error_equals_loops_over_known_pixels():
    x_hat, x, mask = example()
    expected = [pre_error_by_loops(*image) for image in zip(x_hat * 1.5, x, mask)]
    assert pre_error(x_hat * 1.5, x, mask).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_shift_of_a_tenth_in_0_1_is_an_error_of_a_hundredth_and_20_db():
    x = torch.zeros(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    assert pre_error(x + 0.2, x, mask).item() == pytest.approx(0.01, rel=1e-6)
    assert psnr_known(x + 0.2, x, mask).item() == pytest.approx(20, rel=1e-6)


def test_what_happens_in_the_hole_does_not_count():
    x_hat, x, mask = example()
    elsewhere = torch.where(mask == 1, torch.zeros_like(x), x_hat)
    assert torch.equal(pre_error(x_hat, x, mask), pre_error(elsewhere, x, mask))


def test_the_prediction_is_clamped_before_it_is_compared():
    x, mask = torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    assert pre_error(x * 7, x, mask).item() == 0


def test_an_exact_copy_has_infinite_psnr():
    _, x, mask = example()
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


def test_seam_equals_loops_over_pairs_across_the_border():
    x_hat, x, mask = example()
    expected = [seam_by_loops(*image) for image in zip(x_hat * 1.5, x, mask)]
    assert seam(x_hat * 1.5, x, mask).tolist() == pytest.approx(expected, rel=1e-12)


def test_seam_of_the_original_is_zero():
    _, x, mask = example()
    assert seam(x, x, mask).tolist() == [0, 0, 0]


def test_seam_is_negative_for_a_smoothed_border_and_positive_for_a_patch_of_another_brightness():
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    smooth = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert seam(smooth, x, mask).item() < -0.05
    flat = torch.zeros_like(x)
    assert seam(flat + 0.4 * mask, flat, mask).item() == pytest.approx(0.2, rel=1e-6)


def test_half_precision_inputs_are_measured_in_float64():
    x_hat, x, mask = example()
    x_hat, x = x_hat.bfloat16(), x.bfloat16()
    for metric in (pre_error, psnr_known, seam):
        assert metric(x_hat, x, mask.bfloat16()).dtype == torch.float64
        assert torch.equal(metric(x_hat, x, mask), metric(x_hat.float(), x.float(), mask))


# -- several decoders on the same latents ----------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path):
    """An add and a concat decoder on one first stage, as for Table 3."""
    write_run(tmp_path / "add")
    _, parent = write_first_stage(tmp_path / "add")
    write_decoder(tmp_path / "concat", parent, blend="concat", vqgan=str(tmp_path / "add"))
    return [tmp_path / "add", tmp_path / "concat"]


def _pictures(**others):
    x, mask = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.zeros(2, 1, SIZE, SIZE)
    mask[:, :, 10:] = 1
    return Pictures([0, 1], x, mask, **others)


def test_every_decoder_gets_the_latents_of_the_full_image(two_runs):
    runs, pictures = open_runs(two_runs, CPU), _pictures()
    x, mask = pictures.x, pictures.mask
    with torch.no_grad():
        outputs = {key: x_hat for key, (x_hat, _) in decode_all(runs, pictures).items()}
        model = runs[1].loaded.model
        z = model.encode(x)
        assert torch.equal(outputs[None, "vanilla"], model.first_stage.decode(z))
        assert torch.equal(outputs[runs[1].name, "asym"], model.decode(z, image=x, mask=mask))
        assert torch.equal(outputs[runs[1].name, "asym-nomask"], model.decode(z))
    assert torch.equal(outputs[None, "paste"][:, :, :10], x[:, :, :10])
    assert torch.equal(outputs[None, "paste"][:, :, 10:], outputs[None, "vanilla"][:, :, 10:])


def test_given_latents_take_the_place_of_the_pictures_own(two_runs):
    runs, z = open_runs(two_runs, CPU), torch.randn(2, 4, SIZE // 2, SIZE // 2)
    pictures = _pictures(z=z)
    with torch.no_grad():
        outputs = {key: x_hat for key, (x_hat, _) in decode_all(runs, pictures).items()}
        model = runs[0].loaded.model
        assert torch.equal(outputs[None, "vanilla"], model.first_stage.decode(z))
        expected = model.decode(z, image=pictures.x, mask=pictures.mask)
    assert torch.equal(outputs[runs[0].name, "asym"], expected)


@pytest.mark.parametrize("shape", [(3, SIZE // 2, SIZE // 2), (4, SIZE // 4, SIZE // 4),
                                   (4, SIZE // 2, SIZE)])
def test_latents_of_another_first_stage_or_picture_are_refused(two_runs, shape):
    runs = open_runs(two_runs, CPU)
    with pytest.raises(UserError, match=r"does not fit a picture of 32 x 32 px: .* \(4, 16, 16\)"):
        decode_all(runs, _pictures(z=torch.randn(2, *shape)))


def test_a_picture_whose_sides_the_first_stage_does_not_divide_is_refused(two_runs):
    with pytest.raises(UserError, match="30 x 33 px: both sides must be multiples of 2"):
        decode_all(open_runs(two_runs, CPU), Pictures([0], torch.zeros(1, 3, 33, 30)))


def test_without_masks_only_what_needs_none_is_decoded(two_runs):
    runs, pictures = open_runs(two_runs, CPU), Pictures([0], torch.rand(1, 3, SIZE, SIZE))
    with torch.no_grad():
        keys = set(decode_all(runs, pictures))
    assert keys == {(None, "vanilla"), *((run.name, "asym-nomask") for run in runs)}


def test_a_first_stage_without_a_decoder_of_its_own_has_no_vanilla_rows(two_runs):
    runs, pictures = open_runs(two_runs, CPU), _pictures()
    for run in runs:
        run.first_stage.decoder = None
    with torch.no_grad():
        assert {decoder for _, decoder in decode_all(runs, pictures)} == {"asym", "asym-nomask"}


def test_the_vanilla_decoder_comes_from_whichever_run_has_one(two_runs):
    runs = open_runs(two_runs, CPU)
    runs[0].first_stage.decoder = None
    assert first_stage_of(runs) is runs[1].first_stage


def test_runs_that_cannot_share_a_table_are_refused(two_runs, tmp_path):
    _, parent = write_first_stage(tmp_path / "other", seed=5)
    write_decoder(tmp_path / "other", parent)
    _, parent = write_first_stage(two_runs[0])
    write_decoder(tmp_path / "large", parent, vqgan=str(two_runs[0]), size=64)
    run = two_runs[0]
    for other, reason in ((tmp_path / "other", "different first-stage weights"),
                          (tmp_path / "large", "--size of .*large is 64"), (run, "given twice"),
                          (tmp_path / "gone", "no such run folder")):
        with pytest.raises(UserError, match=reason):
            open_runs([run, other], CPU)


def test_no_tf32_inside_and_as_before_outside():
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    with exact_float32():
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in backends] == before


# -- sums over pictures ----------------------------------------------------------------------------


def pictures(first, last, masks=True):
    """Pictures first..last-1 of a fixed set, with their evaluation masks."""
    generators = [torch.Generator().manual_seed(i) for i in range(first, last)]
    x = torch.stack([torch.rand(3, SIZE, SIZE, generator=g) * 2 - 1 for g in generators])
    mask = torch.stack([torch.tensor(evaluation_mask(SIZE, i))[None].float()
                        for i in range(first, last)]) if masks else None
    return Pictures(list(range(first, last)), x, mask)


FEATURES = 48                # instead of 2,048: a distance takes the cube of it


def fake_inception(images):
    """(features, logits) that depend on the images, without the network's weight file."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(images[0].numel(), FEATURES, generator=generator) / 40
    features = (images.flatten(1) @ weight).relu()
    return features, features * 2


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
    monkeypatch.setattr(metrics, "gather_objects", lambda own: shares)
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
        size, mean = 32, torch.zeros(1)                          # mean: tells the device

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
    networks = open_networks(CPU, tmp_path, "vgg")
    assert networks.lpips is networks.inception is networks.clip is networks.lpips_net is None
    for column, file in (("lpips", "vgg16-397923af.pth"),
                         ("fid", "pt_inception-2015-12-05-6726825d.pth")):
        note = networks.notes[column]
        assert note.startswith(f"n/a: {file} is not in {tmp_path}")
        assert f"{file} and put it there" in note
    assert networks.notes["fid"] == networks.notes["is_mean"]
    with pytest.raises(UserError, match=r"vgg16-397923af.pth is not in"):
        open_networks(CPU, tmp_path, "vgg", asked=True)
    with pytest.raises(UserError, match=r"config\.json"):
        open_networks(CPU, tmp_path, "none", fid=False, clip=tmp_path)


def test_a_process_does_not_look_for_a_file_that_the_first_one_could_not_get(monkeypatch):
    monkeypatch.setattr(metrics, "rank", lambda: 1)
    monkeypatch.setattr(metrics, "gather_objects", lambda own: ["it is not to be had", own])
    monkeypatch.setattr(metrics, "InceptionV3", lambda weights: pytest.fail("looked for"))
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
