"A Kaggle kit for detecting pulmonary embolism in chest CT; import the module you need, e.g. `rsnape_kit.metric`."
__version__ = "0.1.0"
