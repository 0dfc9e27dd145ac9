"""`metamorph score`: FID, CLIP score and the like of a folder of drawn images, whoever drew them.

metamorph score drawn --real val2014 --inception pt_inception-2015-12-05-6726825d.pth
metamorph score drawn --captions captions.json --clip hf:openai/clip-vit-large-patch14
metamorph score drawn --real photos --tower hf:google/siglip-base-patch16-224
metamorph score drawn --geneval evaluation_metadata.jsonl --judge runs/vpit
metamorph score drawn --dpg dpg_bench.csv --judge endpoint:gpt-4o
metamorph score labels --segmentation annotations/validation
"""

import pathlib
import sys
from collections.abc import Mapping

from metamorph_jax import files
from metamorph_jax.errors import UserError
from metamorph_jax.eval.images import dpg, geneval, judged_folders, judging, measures, segments
from metamorph_jax.eval.images.features import ImageSet
from metamorph_jax.eval.tasks.base import write_json
from metamorph_jax.files import shown


def add_arguments(parser) -> None:
    add = parser.add_argument
    add("drawn", help="folder with the drawn images (folders inside it are read, too)")
    add("--real", default="", metavar="FOLDER", help="real images, for distances")
    add("--paired", action="store_true",
        help="the real image of a drawn one has the same name: CLIP, image-image")  # fmt: skip
    add("--captions", default="", metavar="FILE",
        help='JSON, {"name of an image": "caption"}, for CLIP, image-text')  # fmt: skip
    add("--inception", default="", metavar="FILE",
        help="Inception weights of 2015, for FID and inception score")  # fmt: skip
    add("--statistics", default="", metavar="FILE.npz",
        help="of the real images' Inception features (mu, sigma): read, or written if it isn't "
        "there")  # fmt: skip
    add("--fid-size", default="256", metavar="N|none",
        help="side that images are brought to before Inception, in papers 64 or 256; none: as they "
        "are (default: 256)")  # fmt: skip
    add("--fid-whole", action="store_true",
        help="--fid-size is the short side, nothing is cut out (MiniGPT-5)")  # fmt: skip
    add("--fid-64", action="store_true",
        help="FID at 64 px, too, as MM-Interleaved measures it")  # fmt: skip
    add("--clip", default="", metavar="SPEC", help="CLIP weights: hf:OWNER/NAME or a folder")
    add("--prefix", default="", help="before each caption: 'A photo depicts'")
    add("--tower", default="", metavar="SPEC",
        help="weights of a vision tower, for the feature distance")  # fmt: skip
    add("--geneval", default="", metavar="FILE",
        help="evaluation_metadata.jsonl of GenEval, whose layout DRAWN has")  # fmt: skip
    add("--dpg", default="", metavar="FILE",
        help="dpg_bench.csv of DPG-Bench, whose layout DRAWN has")  # fmt: skip
    add("--dpg-mode", default="strict", choices=dpg.MODES, help="official: with its faults")
    add("--segmentation", default="", metavar="FOLDER",
        help="label maps of the true images (0 unlabelled, 1 the first class): DRAWN holds those "
        "that a segmenter found in drawn images, for mIoU")  # fmt: skip
    add("--first-label", type=int, default=0, choices=(0, 1), metavar="0|1",
        help="of the first class in DRAWN's label maps (default: 0)")  # fmt: skip
    add("--samples", type=int, default=4, choices=range(1, 5), metavar="1…4",
        help="images in each file of DPG-Bench, a grid if several (default: 4)")  # fmt: skip
    add("--judge", default="", metavar="SPEC",
        help="who is asked: workdir of a run, published weights, endpoint:MODEL")  # fmt: skip
    add("--judge-config", default="", metavar="FILE[:SIZE]", help="of the judge's weights")
    add("--json", default="", metavar="FILE", help="write the scores and their settings here")


def run(args) -> int:
    if args.geneval or args.dpg:
        return _run_judged(args)
    if args.segmentation:
        return _run_segmented(args)
    asked = measures.Measures(
        args.inception, args.tower, args.clip, _size(args.fid_size), args.fid_64, args.prefix,
        args.statistics, args.fid_whole,
    )  # fmt: skip
    _check(args)
    found = measures.score(gather(args.drawn, args.real, args.captions, args.paired), asked)
    print(table(found.values, found.intervals))
    for note in found.notes:
        print(f"note: {shown(note, 500)}", file=sys.stderr)
    _write(args.json, measures.as_json(found))
    return 0 if found.values else 2


def _check(args) -> None:
    """UserError where options don't make a score together."""
    if not (args.inception or args.tower or args.clip):
        raise UserError(
            "nothing to score with: give --inception FILE (FID, inception score), --clip SPEC "
            "(with --captions or --real and --paired), --tower SPEC (feature distance), "
            "--geneval or --dpg FILE (a judge), or --segmentation FOLDER (mIoU)"
        )
    if args.tower and not args.real:
        raise UserError("--tower gives the distance to real images: give --real FOLDER")
    if args.clip and not (args.captions or (args.real and args.paired)):
        raise UserError("--clip compares with captions or real images: give --captions FILE, or "
                        "--real FOLDER and --paired")  # fmt: skip


def _run_segmented(args) -> int:
    miou, count, lost = segments.score_folders(args.drawn, args.segmentation, args.first_label)
    scores = {"mIoU": 100 * miou}
    print(table(scores, {}))
    if lost:
        print(f"note: {len(lost)} images have no label map, such as {shown(lost[0])}; they are "
              "left out", file=sys.stderr)  # fmt: skip
    settings = {"truth": args.segmentation, "first_label": args.first_label, "images": count}
    _write(args.json, {"scores": scores, "settings": settings, "left_out": len(lost)})
    return 0


def _run_judged(args) -> int:
    if args.geneval and args.dpg:
        raise UserError("--geneval and --dpg are two benchmarks: give one of them")
    # Files are looked at before the judge is loaded, which takes longer.
    if args.geneval:
        geneval.find_images(args.drawn, geneval.read_prompts(args.geneval))
    else:
        dpg.find_images(args.drawn, dpg.read_items(args.dpg, args.dpg_mode))
    judge = judging.open_judge(args.judge, args.judge_config)
    settings = {"judge": args.judge, "judge_config": args.judge_config}
    if args.geneval:
        scores, lines, left = judged_folders.score_geneval(args.drawn, args.geneval, judge)
        settings |= {"benchmark": "GenEval's prompts, a judge's likelihood of yes"}
    else:
        scores, lines, left = judged_folders.score_dpg(
            args.drawn, args.dpg, judge, args.samples, args.dpg_mode
        )
        settings |= {"benchmark": "DPG-Bench's questions, a judge's likelihood of yes"}
        settings |= {"mode": args.dpg_mode, "samples": args.samples}
    print(table(scores, {}))
    if left:
        print(f"note: {left} were left out: an image is bad, or the judge had no answer",
              file=sys.stderr)  # fmt: skip
    _write(args.json, {"scores": scores, "settings": settings, "left_out": left, "results": lines})
    return 0 if scores else 2


def _write(path: str, value) -> None:
    if path:
        write_json(pathlib.Path(path), value)


def _size(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal() or not int(text):
        raise UserError(f"--fid-size must be a number of pixels or none, not {shown(text)}")
    return int(text)


def gather(drawn: str, real: str, captions: str, paired: bool) -> measures.Drawn:
    """The images of folders with what belongs to them.

    Raises:
        UserError: a folder has no images, no image has a caption, or none has a partner.
    """
    folder, paths = pathlib.Path(drawn), ImageSet.of_folder(drawn).paths
    others = ImageSet.of_folder(real).paths if real else ()
    texts, partners = (), ()
    if captions:
        texts = _matched(paths, folder, _captions(captions), captions)
    if paired and real:
        table = {str(pathlib.Path(p).relative_to(real).with_suffix("")): p for p in others}
        partners = _matched(paths, folder, table, real)
    return measures.Drawn(paths, texts, partners, others)


def _captions(file: str) -> Mapping[str, str]:
    found = files.read_json(file, dict, what='{"name of an image": "caption"}', max_bytes=2**30)
    for name, text in found.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{shown(file)}: the caption of {shown(name)} is not a text")
    return found


def _matched(paths, folder: pathlib.Path, table: Mapping[str, str], where: str) -> tuple:
    """What the table has for each image, by its path in the folder or its name, with or without
    the extension; None where it has nothing."""
    out = []
    for path in map(pathlib.Path, paths):
        inside = path.relative_to(folder)
        names = (str(inside), str(inside.with_suffix("")), path.name, path.stem)
        out.append(next((table[name] for name in names if name in table), None))
    lost = [path for path, one in zip(paths, out, strict=True) if one is None]
    if len(lost) == len(paths):
        raise UserError(f"{shown(where)} has nothing for any image, such as {shown(paths[0])}")
    if lost:
        print(
            f"{shown(where)} has nothing for {len(lost)} of {len(paths)} images, such as "
            f"{shown(lost[0])}; they are left out of the scores that need it",
            file=sys.stderr,
        )
    return tuple(out)


def table(values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]) -> str:
    """The scores a line each, with their intervals."""
    width = max(map(len, values), default=0)
    lines = []
    for name, value in values.items():
        low_high = intervals.get(name)
        more = f"   {low_high[0]:.4f} to {low_high[1]:.4f}" if low_high else ""
        lines.append(f"{name:{width}}  {value:10.4f}{more}")
    return "\n".join(lines)
