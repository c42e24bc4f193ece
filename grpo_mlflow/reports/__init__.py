"""Reports: one self-contained interactive page of a run or a study, from plain records and numbers.

A page loads nothing: styles, scripts and data are inside it. It can be opened as a file, mailed, and shown in a frame
that may only run scripts, such as MLflow's artifact viewer. Curves are drawn by uPlot 1.6.32 (MIT, assets/).
"""
