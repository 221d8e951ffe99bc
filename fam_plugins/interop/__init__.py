"""One file per partner: evaluation harnesses, few-shot libraries. Imported by name, nothing here.

:mod:`fam_plugins.interop.harnesses` and :mod:`fam_plugins.interop.easyfsl` take the partners'
objects by duck typing, so that neither imports its partner before it is needed;
:mod:`fam_plugins.interop.ray` runs :func:`fam_plugins.dataset.explain_dataset` on many workers.
"""
