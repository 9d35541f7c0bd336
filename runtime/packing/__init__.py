"""Many groups into many packs.

Read in this order:

==================  ====================================================================================
:mod:`.packs`       ``packs()``: the stages below, one after another, over lists and streams
:mod:`.windows`     groups are read, checked, and kept to choose from: as many as fit in a window
:mod:`.oversize`    a group beyond the budget: cut, split, dropped, or an error
:mod:`.pool`        groups that wait, and what each would add to the open pack: one file for each ``share``
:mod:`.fill`        best fit: which of them go into a pack together
:mod:`.cost`        how long a pack will take: one small fitted model
:mod:`.ranks`       the same number of packs of like cost for every rank; totals of each step
:mod:`.report`      what was read, packed, cut and dropped
==================  ====================================================================================
"""
