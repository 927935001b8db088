"""The options of `drl report`."""

DESCRIPTION = (
    "Tables of the scores under a folder of runs, in Markdown: a row per variant and acting mode, a column per task, "
    "mean over seeds with its 95% interval, average and interquartile mean over tasks, and how likely one row is "
    "better than each other."
)


def add(verb) -> None:
    """Give them to the parser of the verb."""
    verb.add_argument("runs", type=str, nargs="+", help="folder that holds runs at any depth, or a file written with "
                      "--pack; several are one report; where all runs in <folder>/NAME are of one kind, they are "
                      "called NAME")
    verb.add_argument("--write", type=str | None, default=None, help="folder for the page, results.md, and its "
                      "figures, PNG; needs the extra drl[report]")
    verb.add_argument("--pack", type=str | None, default=None, help="JSON file for all that the page needs: the same "
                      "page comes from it")
    verb.add_argument("--against", type=str, default="", help="name of the row that the others are held against "
                      "(default: the best average)")
    verb.add_argument("--readme", type=str | None, default=None, help="file in which the short table and figure "
                      "replace what stands between <!-- scores --> and <!-- end of scores -->; with --write")
    verb.add_argument("--figure", type=str | None, default=None, help="draw the scores alone into this PNG file; needs "
                      "the extra drl[report]")
