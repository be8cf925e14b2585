"""The order of training, random crops, padding, and what is read for a batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from grounding_data import make_dataset, mask_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tvg_lib.data.batching import BatchPlan, Crop, evaluation_batches, pad
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.moments import TACOS_C3D, TimeGrid

TWO_SECONDS = TimeGrid(clip_size=2, stride=2, fps=1)


def dataset(grid=TWO_SECONDS, **changes):
    """Seven videos, one of them without a question, 23 queries."""
    videos = {f"v{n}": 20 + 7 * n for n in range(7)}
    queries = [(f"v{n % 6}", [[grid.step * (n % 5), grid.step * (n % 5 + 3)]]) for n in range(23)]
    return make_dataset(videos, queries, grid, **changes)


def queries_of(specs):
    return [query for spec in specs for sample in spec.samples for query in sample.queries]


class TestOrder:
    @pytest.mark.parametrize(("videos", "queries"), [(1, 1), (3, 2), (4, 4), (100, 100)])
    def test_every_query_once_an_epoch(self, videos, queries):
        plan = BatchPlan(dataset(), videos, queries)
        for epoch in range(3):
            specs = plan.epoch(epoch)
            assert sorted(queries_of(specs)) == list(range(23))
            assert [spec.number for spec in specs] == list(range(len(specs)))
            for spec in specs:
                assert 1 <= len(spec.samples) <= videos
                for sample in spec.samples:
                    assert 1 <= len(sample.queries) <= queries
                    positions = plan.dataset.positions_of(sample.video_id)
                    assert set(sample.queries) <= set(positions)

    def test_the_order_depends_on_seed_and_epoch_alone(self):
        plan = BatchPlan(dataset(), 3, 2, seed=5)
        assert plan.epoch(4) == BatchPlan(dataset(), 3, 2, seed=5).epoch(4)
        assert plan.epoch(4) != [replace(spec, epoch=4) for spec in plan.epoch(5)]
        assert plan.epoch(4) != BatchPlan(dataset(), 3, 2, seed=6).epoch(4)
        assert queries_of(plan.epoch(0)) != sorted(queries_of(plan.epoch(0)))

    def test_an_incomplete_last_batch_may_be_left_out(self):
        specs = BatchPlan(dataset(), 4, 1).epoch(0)
        assert [len(spec.samples) for spec in specs] == [4, 4, 4, 4, 4, 3]
        assert BatchPlan(dataset(), 4, 1, drop_last=True).epoch(0) == specs[:-1]
        only = BatchPlan(dataset(), 100, 1, drop_last=True).epoch(0)
        assert [len(spec.samples) for spec in only] == [23]

    def test_batches_of_similar_lengths_lose_nothing_and_mix_little(self):
        videos = {f"v{n}": 20 * 2 ** (n % 3) + n for n in range(18)}  # three octaves of length
        data = make_dataset(videos, [(f"v{n % 18}", [[2, 8]]) for n in range(50)], TWO_SECONDS)
        plan = BatchPlan(data, 4, 2, similar_lengths=True)
        specs = plan.epoch(0)
        assert sorted(queries_of(specs)) == list(range(50))
        assert [spec.number for spec in specs] == list(range(len(specs)))
        lengths = [[data.videos[s.video_id].duration for s in spec.samples] for spec in specs]
        assert sum(max(found) >= 2 * min(found) for found in lengths) <= 2  # one per border
        longest = [max(found) for found in lengths]
        assert longest != sorted(longest)  # long batches come among short ones
        assert plan.epoch(0) == specs
        assert plan.epoch(1) != [replace(spec, epoch=1) for spec in specs]
        kept = replace(plan, drop_last=True).epoch(0)
        assert all(len(spec.samples) == 4 for spec in kept)

    def test_sharing_splits_a_batch(self):
        spec = BatchPlan(dataset(), 5, 2).epoch(0)[0]
        for world in (1, 2, 3, 5):
            shares = [spec.share(rank, world).samples for rank in range(world)]
            assert all(shares)
            assert sorted(s.queries for share in shares for s in share) == sorted(
                s.queries for s in spec.samples
            )
        with pytest.raises(ConfigurationError, match="5 videos cannot be shared by 6"):
            spec.share(0, 6)

    @pytest.mark.parametrize("crop", [None, Crop(max_clips=12)])
    def test_processes_see_what_one_process_sees(self, crop):
        plan = BatchPlan(dataset(), 4, 2, crop=crop)
        spec = plan.epoch(1)[0]
        whole = plan.load(spec)
        for rank in range(2):
            share = plan.load(spec.share(rank, 2))
            for row, query_id in enumerate(share.query_ids):
                other = whole.query_ids.index(query_id)
                assert torch.equal(share.moments[row], whole.moments[other])
                mine, theirs = share.query_video[row], whole.query_video[other]
                assert share.grids[mine] == whole.grids[theirs]

    @pytest.mark.parametrize("arguments", [{"videos_per_batch": 0}, {"queries_per_video": -1}])
    def test_empty_batches_are_refused(self, arguments):
        with pytest.raises(ConfigurationError, match="at least one"):
            BatchPlan(dataset(), **arguments)

    def test_a_data_set_without_queries_is_refused(self):
        empty = make_dataset({"a": 5}, [])
        with pytest.raises(DataError, match="made-up has no queries to train on"):
            BatchPlan(empty)
        with pytest.raises(DataError, match="made-up has no queries to evaluate"):
            next(evaluation_batches(empty))


class TestLoading:
    def test_a_batch_holds_its_videos_words_and_moments(self):
        data = dataset()
        batch = BatchPlan(data, 3, 2).load(BatchPlan(data, 3, 2).epoch(0)[0])
        assert batch.video.dtype == batch.text.dtype == batch.moments.dtype == torch.float32
        for row, video_id in enumerate(batch.video_ids):
            features = torch.from_numpy(data.video_features[video_id])
            assert torch.equal(batch.video[row, batch.video_mask[row]], features)
            assert batch.video[row, ~batch.video_mask[row]].eq(0).all()
            assert batch.video_mask[row].sum() == len(features)
            assert batch.durations[row] == data.videos[video_id].duration
        for row, query_id in enumerate(batch.query_ids):
            query = data.query(query_id)
            assert batch.video_ids[batch.query_video[row]] == query.video_id
            words = torch.from_numpy(data.text_features[query_id])
            assert torch.equal(batch.text[row, batch.text_mask[row]], words)
            grid = data.videos[query.video_id].grid
            seconds = grid.to_seconds(batch.moments[row, batch.moment_mask[row]].double().numpy())
            np.testing.assert_allclose(seconds, query.moments, atol=1e-4)

    def test_loading_again_gives_the_same(self):
        plan = BatchPlan(dataset(), 3, 2, crop=Crop(max_clips=12))
        spec = plan.epoch(2)[1]
        first, second = plan.load(spec), plan.load(spec)
        assert torch.equal(first.video, second.video)
        assert torch.equal(first.moments, second.moments)
        assert first.grids == second.grids

    def test_crops_differ_between_epochs_and_seeds(self):
        def offsets(seed, epoch):
            plan = BatchPlan(dataset(), 3, 2, seed, crop=Crop(max_clips=12))
            loaded = (plan.load(spec) for spec in plan.epoch(epoch))
            return sorted(grid.offset for batch in loaded for grid in batch.grids)

        assert offsets(0, 0) != offsets(0, 1) != offsets(1, 1)

    def test_only_what_the_batch_needs_is_read(self):
        data = dataset()
        plan = BatchPlan(data, 2, 3)
        specs = plan.epoch(0)
        assert data.video_features.reads == data.text_features.reads == []
        batch = plan.load(specs[0])
        assert sorted(data.video_features.reads) == sorted(batch.video_ids)
        assert sorted(data.text_features.reads) == sorted(batch.query_ids)

    def test_times_keep_their_precision_on_the_way_to_a_device(self):
        batch = BatchPlan(dataset(), 2, 2).load(BatchPlan(dataset(), 2, 2).epoch(0)[0])
        low = batch.to("cpu", torch.bfloat16)
        assert low.video.dtype == low.text.dtype == torch.bfloat16
        assert torch.equal(low.moments, batch.moments)
        assert low.query_ids == batch.query_ids
        assert batch.to("cpu").video.dtype == torch.float32

    def test_queries_without_moments_can_be_evaluated(self):
        data = make_dataset({"a": 5}, [("a", []), ("a", [[1, 2], [3, 4]])])
        (batch,) = evaluation_batches(data)
        assert batch.moment_mask.tolist() == [[False, False], [True, True]]

    def test_pad(self):
        out, mask = pad([np.ones((2, 3)), np.full((4, 3), 2.0)])
        assert out.shape == (2, 4, 3)
        assert torch.equal(mask, mask_of([2, 4]))
        assert out.sum(dim=(1, 2)).tolist() == [6, 24]


class TestEvaluationBatches:
    @pytest.mark.parametrize(("videos", "queries"), [(8, 64), (1, 64), (8, 3), (2, 1)])
    def test_every_query_once_within_both_bounds(self, videos, queries):
        data = dataset()
        batches = list(evaluation_batches(data, videos, queries))
        asked = [query_id for batch in batches for query_id in batch.query_ids]
        assert sorted(asked) == sorted(query.id for query in data.queries)
        for batch in batches:
            assert len(batch.video_ids) == len(batch.video) <= videos
            assert len(batch.query_ids) <= queries
        durations = [d for batch in batches for d in batch.durations]
        assert durations == sorted(durations)

    @pytest.mark.parametrize("bounds", [(0, 1), (1, 0)])
    def test_empty_bounds_are_refused(self, bounds):
        with pytest.raises(ConfigurationError, match="at least one"):
            next(evaluation_batches(dataset(), *bounds))


spans = st.tuples(st.floats(0, 1), st.floats(0.01, 0.5)).map(
    lambda t: (t[0] * 0.99, min(t[0] * 0.99 + t[1], 1.0))
)


class TestCropping:
    @settings(max_examples=60)
    @given(
        clips=st.integers(2, 60),
        max_clips=st.integers(1, 70),
        ratio=st.sampled_from([None, (0.9, 1.0), (0.2, 0.7), (1.0, 1.0)]),
        queries=st.lists(st.lists(spans, min_size=1, max_size=3), min_size=1, max_size=3),
        seed=st.integers(0, 1000),
    )
    def test_what_is_kept_is_inside_and_still_at_the_same_seconds(
        self, clips, max_clips, ratio, queries, seed
    ):
        grid = TWO_SECONDS
        seconds = [[[a * 2 * clips, b * 2 * clips] for a, b in moments] for moments in queries]
        data = make_dataset({"v": clips}, [("v", moments) for moments in seconds], grid)
        crop = Crop(max_clips, ratio)
        plan = BatchPlan(data, 1, 3, seed, crop)
        batch = plan.load(plan.epoch(0)[0])
        length = int(batch.video_mask.sum())
        assert length <= max(min(clips, max_clips), 1)
        if clips <= max_clips and ratio is not None:
            assert ratio[0] * clips <= length <= ratio[1] * clips + 1
        if clips <= max_clips and ratio is None:
            assert length == clips
        # Channel 0 is the index of the clip: the features are those of the moved grid.
        index = batch.video[0, :, 0].numpy()
        np.testing.assert_array_equal(np.diff(index), 1)
        assert batch.grids[0].to_seconds(0) == pytest.approx(grid.to_seconds(float(index[0])))
        # A clip stands for half a step to both sides.
        moments = batch.moments[batch.moment_mask]
        assert (moments >= -0.5).all()
        assert (moments <= length - 0.5).all()
        assert len(batch.query_ids) >= 1
        for row, query_id in enumerate(batch.query_ids):
            kept = batch.moments[row, batch.moment_mask[row]].double().numpy()
            times = batch.grids[0].to_seconds(kept)
            originals = data.query(query_id).moments
            for start, end in times:
                inside = [(a, b) for a, b in originals if a <= start + 1e-4 and end <= b + 1e-4]
                assert inside
                longest_possible = 2 * length
                share = [(end - start) / (b - a) for a, b in inside]
                assert max(share) > 0.5 - 1e-3 or end - start == pytest.approx(
                    longest_possible, abs=2.01
                )

    @settings(max_examples=60)
    @given(
        clips=st.integers(10, 80),
        moments=st.lists(spans, min_size=1, max_size=3),
        seed=st.integers(0, 1000),
    )
    def test_windows_cover_every_moment_where_one_can(self, clips, moments, seed):
        index = np.array(moments) * clips - 0.5
        crop = Crop(max_clips=clips // 2, ratio=None)
        starts = range(clips - clips // 2 + 1)

        def share(start, first, last):
            inside = min(last, start + clips // 2 - 0.5) - max(first, start - 0.5)
            return max(inside, 0) / (last - first)

        shares = np.array([[share(start, *moment) for moment in index] for start in starts])
        assume((np.abs(shares - 0.5) > 1e-9).all())
        start, length = crop.window(clips, [index], np.random.default_rng(seed))
        assert length == clips // 2
        assert start in starts
        if (shares > 0.5).all(1).any():
            assert (shares[start] > 0.5).all()
        elif (shares > 0.5).any():
            assert (shares[start] > 0.5).any()

    def test_far_apart_moments_leave_one_of_them(self):
        data = make_dataset({"v": 1000}, [("v", [[10, 14], [900, 903]])])
        plan = BatchPlan(data, 1, 1, crop=Crop(max_clips=50))
        for epoch in range(5):
            batch = plan.load(plan.epoch(epoch)[0])
            kept = batch.grids[0].to_seconds(batch.moments[0, batch.moment_mask[0]].double())
            assert kept.tolist() in ([[10, 14]], [[900, 903]])

    def test_a_moment_longer_than_the_window_fills_it(self):
        data = make_dataset({"v": 100}, [("v", [[5, 95]])])
        plan = BatchPlan(data, 1, 1, crop=Crop(max_clips=10))
        batch = plan.load(plan.epoch(0)[0])
        assert batch.moments.tolist() == [[[-0.5, 9.5]]]
        assert batch.grids[0].offset == pytest.approx(45, abs=1)

    def test_queries_far_apart_in_a_long_video_are_asked_apart(self):
        data = make_dataset({"v": 400}, [("v", [[2, 6]]), ("v", [[390, 396]]), ("v", [[3, 9]])])
        plan = BatchPlan(data, 2, 3, crop=Crop(max_clips=40))
        for epoch in range(15):
            (spec,) = plan.epoch(epoch)
            groups = {frozenset(sample.queries) for sample in spec.samples}
            assert groups == {frozenset({0, 2}), frozenset({1})}
            assert sorted(plan.load(spec).query_ids) == ["q0", "q1", "q2"]

    def test_a_random_crop_drops_what_it_leaves_outside(self):
        data = make_dataset({"v": 40}, [("v", [[2, 6]]), ("v", [[34, 38]])])
        plan = BatchPlan(data, 1, 2, crop=Crop(max_clips=40, ratio=(0.5, 0.5)))
        for epoch in range(15):
            spec = plan.epoch(epoch)[0]
            first = data.queries[spec.samples[0].queries[0]].id
            assert plan.load(spec).query_ids == (first,)

    def test_fractional_grids_move_too(self):
        data = dataset(TACOS_C3D)
        plan = BatchPlan(data, 7, 4, crop=Crop(max_clips=12))
        for spec in plan.epoch(0):
            batch = plan.load(spec)
            for row, query_id in enumerate(batch.query_ids):
                video = batch.query_video[row]
                index = batch.moments[row, 0].double().numpy()
                whole = (index > -0.5) & (index < batch.video_mask[video].sum().item() - 0.5)
                seconds = batch.grids[video].to_seconds(index)[whole]
                expected = data.query(query_id).moments[0][whole]
                np.testing.assert_allclose(seconds, expected, atol=1e-4)
                assert whole.any()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_clips": 0}, "must be positive, found 0"),
            ({"max_clips": 5, "ratio": (0.9, 0.5)}, "low <= high"),
            ({"max_clips": 5, "ratio": (0.0, 0.5)}, "0 < low"),
            ({"max_clips": 5, "ratio": (0.5, 1.5)}, "high <= 1"),
            ({"max_clips": 5, "min_coverage": 1.0}, "min_coverage"),
            ({"max_clips": 5, "min_coverage": -0.1}, "min_coverage"),
        ],
    )
    def test_impossible_crops_are_refused(self, arguments, message):
        with pytest.raises(ConfigurationError, match=message):
            Crop(**arguments)


def test_no_query_of_a_long_video_is_lost_to_the_crop() -> None:
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 950, 60)
    queries = [("film", [[start, start + rng.uniform(2, 40)]]) for start in starts]
    data = make_dataset({"film": 500}, queries, TWO_SECONDS)
    plan = BatchPlan(data, videos_per_batch=2, queries_per_video=4, crop=Crop(60, (0.9, 1.0)))
    asked = [query for spec in plan.epoch(0) for query in plan.load(spec).query_ids]
    assert sorted(asked) == sorted(query.id for query in data.queries)
