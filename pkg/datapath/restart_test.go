package datapath

const victimEnv = "SM_DATAPATH_VICTIM"

func runVictim() {}
