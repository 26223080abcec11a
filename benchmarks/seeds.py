"""Put the reports of several seeds into one table: the mean over seeds, the range, each seed.

    python benchmarks/seeds.py FOLDER FOLDER ...

FOLDER holds a report.json of eval.py. All must be of the same pictures and masks. A report may
hold several decoders (eval.py RUN RUN ...): each counts as a seed. pre_error is in 1e-5, images in
[0,1]. Differences are ours with mask minus pasted, image by image.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from paper_tables import markdown, short

SHARED = {"vanilla", "paste"}            # rows that every run of a report has, though equal
# (row of the table, decoder, protocol, measure, factor)
ROWS = [
    ("pre_error, first stage's own", "vanilla", "full", "pre_error", 1e5),
    ("ours, with mask", "asym", "full", "pre_error", 1e5),
    ("... median", "asym", "full", "pre_error_median", 1e5),
    ("ours, without", "asym-nomask", "full", "pre_error", 1e5),
    ("PSNR, ours, with mask", "asym", "full", "psnr", 1),
    *((f"{name}{where}, {who}", decoder, protocol, name.lower(), 1)
      for protocol, where in (("full", ""), ("shifted", " (shifted)"))
      for name in ("seam", "LPIPS")
      for who, decoder in (("own", "vanilla"), ("ours", "asym"), ("pasted", "paste")))]


def find(report, decoder, protocol, measure):
    """List a measure over all masks, a value for each run; for SHARED decoders one value."""
    found = [row.get(measure) for row in report["rows"]
             if (row["decoder"], row["protocol"], row["bucket"]) == (decoder, protocol, "all")]
    return found[:1] if decoder in SHARED else found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="has a report.json")
    reports = [json.loads((folder / "report.json").read_text(encoding="utf-8"))
               for folder in parser.parse_args(argv).folders]
    same = {json.dumps([report["n"], report["masks"], report["rows"][0].get("split")])
            for report in reports}
    if len(same) > 1:
        parser.error(f"the reports are not of the same pictures: {' and '.join(sorted(same))}")
    lines = [(name, [value * factor for report in reports
                     for value in find(report, decoder, protocol, measure) if value is not None])
             for name, decoder, protocol, measure, factor in ROWS]
    # The gain of each seed: its own first stage's error over its decoder's.
    gains = [own / ours for report in reports
             for own in find(report, "vanilla", "full", "pre_error")
             for ours in find(report, "asym", "full", "pre_error")]
    lines.insert(4, ("gain", gains))
    for name in ("seam", "lpips"):
        for protocol in ("full", "shifted"):
            lines.append((f"{name}, {protocol}: ours minus pasted", [
                row[name] for report in reports for row in report["differences"]
                if (row["other"], row["protocol"]) == ("paste", protocol) and row.get(name)]))
    for name, key in (("bound of a map, nats", "vlb_nats"), ("... of its histogram by cell",
                                                             "histogram_nats")):
        lines.append((name, [report["prior"][key] for report in reports
                             if (report["prior"] or {}).get(key)]))
    print(markdown(["", "mean of the seeds", "range", "each"], [
        [name, short(mean(values)), f"{short(min(values))} to {short(max(values))}",
         ", ".join(map(short, values))] for name, values in lines if values]))


if __name__ == "__main__":
    main()
