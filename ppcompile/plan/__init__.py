"""``ppcompile plan DATA``: what packing will gain on a data set, before training.

Read in this order:

==================  ====================================================================================
:mod:`.command`     the command line
:mod:`.reading`     records of any spelling, tokenized; what was skipped and why
:mod:`.lengths`     measured: lengths, shared beginnings, unique tokens, padding of the usual layout
:mod:`.budgets`     measured: packs at a budget of tokens
:mod:`.size`        counted: operations and kept bytes a token of a model, on the meta device
:mod:`.cost`        predicted: operations of an epoch, memory of a step; the formulas stand there
:mod:`.study`       all of these for one data set, and the settings that follow
:mod:`.advice`      the study in words, and the settings as code to paste
:mod:`.terminal`    the study as tables
:mod:`.figures`     the study as plots
:mod:`.page`        the study as one HTML file
==================  ====================================================================================
"""
