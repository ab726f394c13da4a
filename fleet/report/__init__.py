"""`fleet report`: tables and figures of a run or a sweep, as one self-contained page, as files and on the terminal."""
