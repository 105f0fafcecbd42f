"""Whether attributions can be trusted: `faithfulness` to the model, `sensitivity` to absence."""
