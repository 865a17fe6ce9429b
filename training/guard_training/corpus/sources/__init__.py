"""The data sets behind GuardReasoner-VLTrain: reading local or hub copies as labelled rows.

``registry`` lists them, ``records`` opens a copy, ``text``, ``images`` and ``released`` turn one raw record into
the fields of a row, and ``build`` makes a corpus of them.
"""
